//! The runtime builds for devices without an operating system, and so without the standard library.

use edge_tests::{command, run, target_folder, workspace};

#[test]
fn the_runtime_builds_without_an_operating_system() {
    let installed = run(command("rustc", [&"--print", &"sysroot"]).current_dir(workspace()));
    for triple in ["aarch64-unknown-none", "thumbv8m.main-none-eabihf"] {
        let libraries = std::path::Path::new(installed.trim()).join("lib/rustlib").join(triple);
        if !libraries.is_dir() {
            assert!(
                std::env::var("CI").as_deref() != Ok("true"),
                "no Rust libraries for {triple}, and this is CI"
            );
            eprintln!("SKIPPED: no Rust libraries for {triple}; `rustup target add {triple}`");
            continue;
        }
        let mut cargo = command(env!("CARGO"), [&"build", &"--quiet", &"--package", &"edge-runtime"]);
        cargo.args(["--release", "--target", triple, "--target-dir"]).arg(target_folder());
        run(cargo.current_dir(workspace()));
    }
}

//! `edge.h` is plain C99 and C++, and means the same to a C compiler as the structs do to Rust.

use std::fmt::Write;
use std::mem::{offset_of, size_of};

use edge::{EdgeError, EdgeLimits, EdgePlanInfo, EdgeSampling, EdgeTeam, EdgeWaiting, EdgeWorkers};
use edge_runtime::Code;
use edge_tests::{command, require_tool, run, workspace};

fn compile(compiler: &str, language: &str, standard: &str, text: &str) {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    std::fs::write(&source, text).unwrap();
    let include = workspace().join("runtime/capi/include");
    let mut cc = command(compiler, [&"-fsyntax-only", &"-Wall", &"-Wextra", &"-Wpedantic", &"-Werror"]);
    cc.args([standard, "-x", language]).arg("-I").arg(include).arg(source);
    run(&mut cc);
}

#[test]
fn the_header_is_c99_and_cpp() {
    let text =
        "#include \"edge.h\"\n#include \"edge.h\"\nint main(void) { return (int)edge_abi_version(); }\n";
    if require_tool("cc") {
        compile("cc", "c", "-std=c99", text);
    }
    if require_tool("c++") {
        compile("c++", "c++", "-std=c++11", text);
    }
}

#[test]
fn structs_and_numbers_are_the_same_in_c_and_rust() {
    let mut text = String::from("#include \"edge.h\"\n");
    let mut check = |claim: String| writeln!(text, "_Static_assert({claim}, \"\");").unwrap();
    macro_rules! same {
        ($c:ident = $rust:ty { $($field:ident),* }) => {
            check(format!("sizeof({}) == {}", stringify!($c), size_of::<$rust>()));
            $(check(format!("offsetof({}, {}) == {}", stringify!($c), stringify!($field), offset_of!($rust, $field)));)*
        };
    }
    same!(edge_error = EdgeError { code, message });
    same!(
        edge_limits = EdgeLimits {
            context,
            batch,
            workers,
            text_bytes,
            cpu_features,
            adapters,
            adapter_rank,
            cache_type
        }
    );
    same!(
        edge_plan_info =
            EdgePlanInfo { arena_bytes, kv_bytes, context, vocabulary, text_bytes, has_tokenizer }
    );
    same!(edge_workers = EdgeWorkers { count, context, run });
    same!(edge_waiting = EdgeWaiting { context, wait, wake });
    same!(
        edge_sampling =
            EdgeSampling { temperature, top_k, top_p, min_p, repeat_penalty, repeat_window, seed }
    );
    check(format!("sizeof(edge_team) >= {}", size_of::<EdgeTeam>()));
    check(format!("_Alignof(edge_team) >= {}", align_of::<EdgeTeam>()));
    check(format!("EDGE_ABI_VERSION == {}", edge::VERSION));
    for (name, code) in CODES {
        check(format!("EDGE_E_{name} == {}", *code as u16));
    }
    if require_tool("cc") {
        compile("cc", "c", "-std=c11", &text);
    }
}

#[rustfmt::skip]
const CODES: &[(&str, Code)] = &[
    ("TRUNCATED", Code::Truncated), ("BAD_MAGIC", Code::BadMagic),
    ("UNSUPPORTED_VERSION", Code::UnsupportedVersion), ("BAD_LENGTH", Code::BadLength),
    ("BAD_VALUE_TYPE", Code::BadValueType), ("BAD_TEXT", Code::BadText), ("BAD_SHAPE", Code::BadShape),
    ("UNSUPPORTED_TYPE", Code::UnsupportedType), ("TENSOR_OUT_OF_BOUNDS", Code::TensorOutOfBounds),
    ("BAD_ALIGNMENT", Code::BadAlignment), ("MISSING_KEY", Code::MissingKey),
    ("WRONG_KEY_TYPE", Code::WrongKeyType), ("OUT_OF_RANGE", Code::OutOfRange),
    ("MISSING_TENSOR", Code::MissingTensor), ("WRONG_SHAPE", Code::WrongShape),
    ("UNKNOWN_FAMILY", Code::UnknownFamily), ("UNSUPPORTED", Code::Unsupported),
    ("ARENA_TOO_SMALL", Code::ArenaTooSmall), ("CONTEXT_FULL", Code::ContextFull),
    ("BAD_TOKEN", Code::BadToken), ("BUFFER_TOO_SMALL", Code::BufferTooSmall),
    ("BAD_ARGUMENT", Code::BadArgument), ("BAD_VOCABULARY", Code::BadVocabulary), ("FORGOTTEN", Code::Forgotten),
    ("FOREIGN_SESSION", Code::ForeignSession), ("BAD_CHECKSUM", Code::BadChecksum),
    ("OTHER_VOCABULARY", Code::OtherVocabulary), ("OTHER_BASE", Code::OtherBase),
];

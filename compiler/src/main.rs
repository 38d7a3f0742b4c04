//! `edgec`: from a large teacher to a small student that runs on a device.
fn main() {}

//! Runs and times a model on a device.
fn main() {}

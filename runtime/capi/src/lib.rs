//! C ABI of the runtime.

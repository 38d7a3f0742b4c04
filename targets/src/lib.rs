//! Devices as validated data.

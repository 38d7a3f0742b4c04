//! The keys and values of all tokens so far, in half precision, position-major in each layer.

/// The bits of keys and values, each `[layers, context, kv_heads * head_dim]`.
pub(super) struct Cache<'a> {
    pub(super) keys: &'a mut [u16],
    pub(super) values: &'a mut [u16],
    /// Elements of one layer, `context * kv_heads * head_dim`.
    pub(super) layer: usize,
}

impl Cache<'_> {
    /// The keys and values of one layer, each `[context, kv_heads * head_dim]`.
    pub(super) fn layer(&mut self, index: usize) -> (&mut [u16], &mut [u16]) {
        let range = index * self.layer..(index + 1) * self.layer;
        (&mut self.keys[range.clone()], &mut self.values[range])
    }
}

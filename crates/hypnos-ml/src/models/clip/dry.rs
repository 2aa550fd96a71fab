//! The text encoder in a dry run: the layers and the life of every value as in its `forward`.

use super::{ClipText, Layer};
use crate::dry_run::{DryTensor, Meter};
use crate::ops::dry as ops;

impl ClipText {
    /// [`ClipText::forward`] of `b` prompts.
    pub(crate) fn dry(&self, meter: &Meter, b: usize) -> DryTensor {
        let dims = [b, self.n_positions];
        let mut tokens = ops::embedding(meter, &dims, &self.token_embedding);
        for (_, row) in &self.learned {
            let here = DryTensor::constant(meter, &[b, self.n_positions, 1]);
            let learned = ops::embedding(meter, &dims, row);
            tokens = tokens.broadcast_times(&here.affine()).plus(&learned.broadcast_times(&here));
        }
        let mut x = tokens.plus(&ops::embedding(meter, &dims, &self.position_embedding));
        for layer in &self.layers {
            x = layer.dry(&x);
        }
        self.final_layer_norm.dry(&x)
    }
}

impl Layer {
    fn dry(&self, x: &DryTensor) -> DryTensor {
        let (stream, dtype) = (x.dtype(), self.precision.dtype());
        let hidden = self.layer_norm1.dry(x).to_dtype(dtype);
        let (q, k, v) = (self.q_proj.dry(&hidden), self.k_proj.dry(&hidden), self.v_proj.dry(&hidden));
        let attended = self.out_proj.dry(&ops::attention(&q, &k, &v, self.n_heads));
        let x = x.plus(&attended.to_dtype(stream));
        let hidden = self.fc1.dry(&self.layer_norm2.dry(&x).to_dtype(dtype));
        x.plus(&self.fc2.dry(&ops::activate(&hidden)).to_dtype(stream))
    }
}

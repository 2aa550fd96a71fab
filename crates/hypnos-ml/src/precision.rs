//! What the models compute in: the one place that decides it, for every device and every network.
//!
//! | | `f32` | `tf32` | `bf16` |
//! |---|---|---|---|
//! | what flows through text encoder, UNet and autoencoder, and its gradients | f32 | f32 | bf16 |
//! | factors of their matrix products and convolutions | f32 | 10 bits | bf16 |
//! | all else that is computed on a GPU | f32 | f32, factors of products 10 bits | f32 |
//! | default | CPUs, older GPUs | | GPUs from Ampere on |
//!
//! In bf16 the three models round their inputs, and their outputs have the dtype of the inputs, which is f32: pictures,
//! latents, noise, a picture's moments, hidden states of a text. In between, these are f32 in every precision:
//!
//! * all sums, in f32 at least: of products and convolutions, of norms' statistics, of softmax, of biases' gradients
//! * the weights that learn, their gradients and the sums of these, AdamW's moments. A matrix, kernel or bias that learns
//!   has a copy in bf16, which the optimiser changes with it; a frozen matrix or kernel is held in bf16 alone
//! * biases as they are held; cuBLASLt and cuDNN add a copy in bf16
//! * the weights of norms, embeddings of tokens and positions, and the layers that embed a timestep
//! * the hidden states between the layers of the text encoder: only values inside its layers are rounded
//! * the sum of the gradients that the UNet's attentions give to a text
//!
//! And these, which are no part of the three models: the noise schedule, latents between the steps of a sampler,
//! guidance, every loss and the pictures, latents and features that it compares, the discriminator, the perceptual
//! network, the segmenter, and the networks that judge pictures.

use std::fmt;
use std::str::FromStr;

use candle_core::DType;
use serde::Serialize;

use super::{Error, Result};

/// What text encoder, UNet and autoencoder compute in. `Display` and `FromStr` use the names of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// `f32`, without rounding in between.
    F32,
    /// `tf32`: f32 in memory; a GPU rounds the factors of products and convolutions to 10 bits of mantissa.
    Tf32,
    /// `bf16`: 7 bits of mantissa and the exponents of f32, in memory and as factors.
    Bf16,
}

impl Precision {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::Tf32, Self::Bf16];

    /// The oldest compute capability whose tensor cores have TF32 and bf16: Ampere's.
    const CAPABILITY: (i32, i32) = (8, 0);

    /// The name outside this program.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Tf32 => "tf32",
            Self::Bf16 => "bf16",
        }
    }

    /// The names of several, with commas between them.
    pub fn names(precisions: &[Self]) -> String {
        precisions.iter().map(|precision| precision.name()).collect::<Vec<_>>().join(", ")
    }

    /// What a device computes in: `asked`, or else what suits it, bf16 or f32. `capability` is a GPU's compute
    /// capability, major and minor; none is a CPU.
    ///
    /// [`Error::Setting`] for what the device does not have: it is never replaced by another.
    pub fn chosen(asked: Option<Self>, capability: Option<(i32, i32)>) -> Result<Self> {
        let is_able = capability.is_some_and(|capability| capability >= Self::CAPABILITY);
        match asked {
            None if is_able => Ok(Self::Bf16),
            None => Ok(Self::F32),
            Some(asked) if is_able || asked == Self::F32 => Ok(asked),
            Some(asked) => {
                let device = capability.map_or("a CPU".to_owned(), |(major, minor)| {
                    format!("a GPU of compute capability {major}.{minor} (8.0 has the others)")
                });
                Err(Error::setting("precision", format!("wanted f32 on {device}, got {asked}")))
            }
        }
    }

    /// The dtype of what flows through text encoder, UNet and autoencoder.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 | Self::Tf32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }

    /// The dtype that a frozen weight of text encoder, UNet or autoencoder is held in, by its name and shape: that of
    /// [`Self::dtype`] for matrices and kernels, f32 for vectors and embeddings.
    pub(crate) fn held_in(self, name: &str, shape: &[usize]) -> DType {
        // `token_embedding.weight`, `position_embedding.weight`, `time_embedding.linear_1.weight`
        let is_factor = shape.len() > 1 && !name.contains("embedding");
        if is_factor { self.dtype() } else { DType::F32 }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Precision {
    type Err = Error;

    /// [`Error::Input`] lists the names there are.
    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|precision| precision.name() == name).ok_or_else(|| {
            Error::input(format!("unknown precision {name:?}; wanted one of {}", Self::names(&Self::ALL)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_computes_in_what_suits_it_where_nothing_is_asked() {
        let of = |capability| Precision::chosen(None, capability).expect("a precision");
        assert_eq!([of(None), of(Some((7, 5)))], [Precision::F32; 2]);
        assert_eq!([of(Some((8, 0))), of(Some((9, 0))), of(Some((12, 0)))], [Precision::Bf16; 3]);
    }

    #[test]
    fn what_is_asked_is_done_or_refused_in_one_line() {
        for asked in Precision::ALL {
            assert_eq!(Precision::chosen(Some(asked), Some((8, 6))).expect("it has all"), asked);
            assert_eq!(asked.name().parse::<Precision>().expect("a name"), asked);
        }
        let f32 = Some(Precision::F32);
        assert_eq!(Precision::chosen(f32, None).expect("every device has it"), Precision::F32);
        assert_eq!(Precision::chosen(f32, Some((6, 1))).expect("every device has it"), Precision::F32);
        let refused = |asked, capability| {
            Precision::chosen(Some(asked), capability).expect_err("a refusal").to_string()
        };
        assert_eq!(refused(Precision::Bf16, None), "precision: wanted f32 on a CPU, got bf16");
        assert_eq!(
            refused(Precision::Tf32, Some((7, 5))),
            "precision: wanted f32 on a GPU of compute capability 7.5 (8.0 has the others), got tf32"
        );
        let words = "half".parse::<Precision>().expect_err("a refusal").to_string();
        assert_eq!(words, "unknown precision \"half\"; wanted one of f32, tf32, bf16");
    }

    #[test]
    fn frozen_matrices_and_kernels_are_held_in_what_is_computed_in_and_all_else_in_f32() {
        for (name, shape, wanted) in [
            ("unet.conv_in.weight", &[320, 4, 3, 3][..], DType::BF16),
            ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight", &[320, 768], DType::BF16),
            ("down_blocks.0.resnets.0.time_emb_proj.weight", &[320, 1280], DType::BF16),
            ("down_blocks.0.resnets.0.time_emb_proj.bias", &[320], DType::F32),
            ("conv_norm_out.weight", &[320], DType::F32),
            ("time_embedding.linear_1.weight", &[1280, 320], DType::F32),
            ("text_model.embeddings.token_embedding.weight", &[49408, 768], DType::F32),
            ("text_model.embeddings.position_embedding.weight", &[77, 768], DType::F32),
            ("embedding.sks", &[1, 768], DType::F32),
        ] {
            assert_eq!(Precision::Bf16.held_in(name, shape), wanted, "{name}");
            assert_eq!(Precision::Tf32.held_in(name, shape), DType::F32, "{name}");
        }
    }
}

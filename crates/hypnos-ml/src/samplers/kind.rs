//! The samplers by name, and which settings of a scheduler's file each can honour.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::diffusion::Config;
use crate::{Error, Result};

/// A way from noise to latents. `Display` and `FromStr` use the names of the command line and the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Sampler {
    /// `ddim`, with η = 0.
    Ddim,
    /// `pndm`, the linear multistep part alone (PLMS).
    Pndm,
    /// `dpmpp-2m`: DPM-Solver++, second order, multistep.
    Dpmpp2m,
    /// `dpmpp-2m-karras`: the same over the noise levels of Karras et al.
    Dpmpp2mKarras,
    /// `euler`.
    Euler,
    /// `euler-a`: Euler, ancestral.
    EulerAncestral,
}

impl Sampler {
    /// All of them, in the order of the documentation.
    pub const ALL: [Self; 6] =
        [Self::Ddim, Self::Pndm, Self::Dpmpp2m, Self::Dpmpp2mKarras, Self::Euler, Self::EulerAncestral];

    /// The name outside this program.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ddim => "ddim",
            Self::Pndm => "pndm",
            Self::Dpmpp2m => "dpmpp-2m",
            Self::Dpmpp2mKarras => "dpmpp-2m-karras",
            Self::Euler => "euler",
            Self::EulerAncestral => "euler-a",
        }
    }

    /// Refuses a `scheduler_config.json` that asks this sampler for something it does not do.
    ///
    /// Departure: whether DPM-Solver++ uses Karras' noise levels is the sampler's name here, not the file's
    /// `use_karras_sigmas`; Euler follows the file.
    /// Departure: PNDM's class starts with Runge-Kutta steps unless `skip_prk_steps` is true; every Stable Diffusion
    /// says true, so a file of another class that says nothing means true here.
    pub(super) fn check(self, config: &Config) -> Result<()> {
        let wanted: &[(&str, &[&str])] = match self {
            Self::Ddim | Self::EulerAncestral => &[],
            Self::Pndm => &[("skip_prk_steps", &["true"])],
            Self::Dpmpp2m | Self::Dpmpp2mKarras => &[
                ("algorithm_type", &[r#""dpmsolver++""#, r#""deis""#]), // the reference reads deis as dpmsolver++,
                ("solver_type", &[r#""midpoint""#, r#""logrho""#, r#""bh1""#, r#""bh2""#]), // and these as midpoint
                ("solver_order", &["2"]),
                ("euler_at_final", &["false"]),
                ("final_sigmas_type", &[r#""zero""#]),
                ("lambda_min_clipped", &[]),
                ("sigma_min", &[]),
                ("sigma_max", &[]),
                ("use_exponential_sigmas", &["false"]),
                ("use_beta_sigmas", &["false"]),
                ("use_lu_lambdas", &["false"]),
            ],
            Self::Euler => &[
                ("interpolation_type", &[r#""linear""#]),
                ("timestep_type", &[r#""discrete""#]),
                ("final_sigmas_type", &[r#""zero""#]),
                ("sigma_min", &[]),
                ("sigma_max", &[]),
                ("use_exponential_sigmas", &["false"]),
                ("use_beta_sigmas", &["false"]),
            ],
        };
        wanted.iter().try_for_each(|(key, values)| {
            let values: Vec<Value> =
                values.iter().filter_map(|text| serde_json::from_str(text).ok()).collect();
            config.only(key, &values).map_err(|err| Error::setting(self.name(), err.to_string()))
        })
    }
}

impl fmt::Display for Sampler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Sampler {
    type Err = Error;

    /// [`Error::Input`] lists the names there are.
    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|sampler| sampler.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::input(format!("unknown sampler {name:?}; wanted one of {names}"))
        })
    }
}

impl TryFrom<String> for Sampler {
    type Error = Error;

    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

impl From<Sampler> for String {
    fn from(sampler: Sampler) -> Self {
        sampler.name().to_owned()
    }
}

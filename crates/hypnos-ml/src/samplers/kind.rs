//! The samplers by name, and which settings of a scheduler's file each can honour.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

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

    /// Settings of a `scheduler_config.json` that this sampler reads and that may ask for what it does not do: the values
    /// that it honours. With any other it runs as with the first of them; with none given, as where nothing is said.
    ///
    /// Departure: whether DPM-Solver++ uses Karras' noise levels is the sampler's name here, not the file's
    /// `use_karras_sigmas`; Euler follows the file.
    /// Departure: PNDM's class starts with Runge-Kutta steps unless `skip_prk_steps` is true; every Stable Diffusion
    /// says true, so a file of another class that says nothing means true here.
    fn supported_values(self) -> &'static [(&'static str, &'static [&'static str])] {
        match self {
            Self::Ddim => &[THRESHOLDING, ZERO_SNR],
            Self::EulerAncestral => &[ZERO_SNR],
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
                (
                    "variance_type",
                    &[
                        "null",
                        r#""fixed_small""#,
                        r#""fixed_small_log""#,
                        r#""fixed_large""#,
                        r#""fixed_large_log""#,
                    ],
                ),
                THRESHOLDING,
                ZERO_SNR,
            ],
            Self::Euler => &[
                ("interpolation_type", &[r#""linear""#]),
                ("timestep_type", &[r#""discrete""#]),
                ("final_sigmas_type", &[r#""zero""#]),
                ("sigma_min", &[]),
                ("sigma_max", &[]),
                ("use_exponential_sigmas", &["false"]),
                ("use_beta_sigmas", &["false"]),
                ZERO_SNR,
            ],
        }
    }

    /// What a `scheduler_config.json` asks of samplers that read the setting and do not do it, and what they do instead:
    /// one line for each setting.
    pub fn ignored_settings(config: &Config) -> Vec<String> {
        let mut lines: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        for sampler in Self::ALL {
            for (key, values) in sampler.supported_values() {
                let supported = values.iter().filter_map(|text| serde_json::from_str(text).ok());
                if let Err(value) = config.only(key, &supported.collect::<Vec<_>>()) {
                    let instead = values.first().unwrap_or(&"null");
                    let line = format!("{key} is {value}, and is taken as {instead} by");
                    lines.entry(line).or_default().push(sampler.name());
                }
            }
        }
        lines.into_iter().map(|(line, samplers)| format!("{line} {}", samplers.join(", "))).collect()
    }

    /// The sampler of the class that a `scheduler_config.json` names, if it is one of them.
    pub fn of_class(name: &str) -> Option<Self> {
        match name.strip_suffix("Scheduler")? {
            "DDIM" | "DDIMParallel" => Some(Self::Ddim),
            "PNDM" => Some(Self::Pndm),
            "DPMSolverMultistep" => Some(Self::Dpmpp2m),
            "EulerDiscrete" => Some(Self::Euler),
            "EulerAncestralDiscrete" => Some(Self::EulerAncestral),
            _ => None,
        }
    }
}

/// Clipping of predicted pictures by their own values: of latents the reference advises against it.
const THRESHOLDING: (&str, &[&str]) = ("thresholding", &["false"]);

/// Betas of which the last leaves no signal (Lin et al. 2023, arXiv 2305.08891, algorithm 1).
const ZERO_SNR: (&str, &[&str]) = ("rescale_betas_zero_snr", &["false"]);

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

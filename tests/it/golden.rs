//! Reads the references' numbers and compares with them. `tests/golden/make.py` says what each file holds.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};
use hypnos::ml::param::Param;
use hypnos::ml::precision::Precision;
use hypnos::ml::weights::Weights;
use safetensors::SafeTensors;

/// Outputs: relative to the reference's norm, and its largest element to its largest element.
pub(crate) const OUTPUT: f64 = 1e-4;
/// Gradients: relative to the norm of the reference's gradient.
pub(crate) const GRADIENT: f64 = 1e-3;

/// Where a test computes, in what dtype, and how near it must come to the reference there.
pub(crate) struct Place {
    pub(crate) device: Device,
    pub(crate) dtype: DType,
    /// Outputs and gradients of one operation.
    pub(crate) operation: (f64, f64),
    /// Outputs of a whole model.
    pub(crate) model_output: f64,
    /// Gradients of a whole model. `None`: rounding moves them so far that there is nothing to compare.
    pub(crate) model_gradient: Option<f64>,
}

impl Place {
    pub(crate) fn cpu() -> Self {
        Self::f32(Device::Cpu)
    }

    pub(crate) fn f32(device: Device) -> Self {
        let (operation, model_output, model_gradient) = ((OUTPUT, GRADIENT), OUTPUT, Some(GRADIENT));
        Self { device, dtype: DType::F32, operation, model_output, model_gradient }
    }

    /// The precision of that dtype.
    pub(crate) fn precision(&self) -> Precision {
        if self.dtype == DType::BF16 { Precision::Bf16 } else { Precision::F32 }
    }

    /// The values where the test computes; weights stay f32 in every dtype.
    pub(crate) fn weight(&self, value: &Tensor) -> Tensor {
        value.to_device(&self.device).expect("values on the device")
    }

    /// The values where and in what dtype the test computes.
    pub(crate) fn input(&self, value: &Tensor) -> Tensor {
        self.weight(value).to_dtype(self.dtype).expect("values of the dtype")
    }

    /// Compares a gradient that went through a whole model.
    pub(crate) fn check_gradient(&self, what: &str, grad: &Tensor, wanted: &Tensor) {
        if let Some(tolerance) = self.model_gradient {
            return assert_close(what, grad, wanted, tolerance);
        }
        assert_eq!(grad.dims(), wanted.dims(), "{what}: shape");
        let sum = grad.to_dtype(DType::F32).and_then(|grad| grad.sqr()?.sum_all()?.to_scalar::<f32>());
        assert!(sum.expect("a number").is_finite(), "{what} is not finite");
    }
}

/// Where a golden lies: in the directory that `HYPNOS_GOLDENS` names, for sizes too large to be committed, or else with
/// the committed ones.
pub(crate) fn path(name: &str) -> PathBuf {
    let other = std::env::var_os("HYPNOS_GOLDENS").map(|dir| PathBuf::from(dir).join(name));
    other.filter(|path| path.exists()).unwrap_or_else(|| committed(name))
}

fn committed(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// One file of numbers.
pub(crate) struct Golden {
    name: String,
    tensors: HashMap<String, Tensor>,
    metadata: HashMap<String, String>,
}

impl Golden {
    pub(crate) fn open(name: &str) -> Self {
        Self::read(name, &path(&format!("{name}.safetensors")))
    }

    /// The committed one, for what does not ask how well it agrees.
    pub(crate) fn committed(name: &str) -> Self {
        Self::read(name, &committed(&format!("{name}.safetensors")))
    }

    fn read(name: &str, file: &Path) -> Self {
        let bytes = std::fs::read(file).expect("the golden is committed");
        let (_, header) = SafeTensors::read_metadata(&bytes).expect("a safetensors file");
        let metadata = header.metadata().clone().unwrap_or_default();
        let tensors = candle_core::safetensors::load(file, &Device::Cpu).expect("a safetensors file");
        Self { name: name.into(), tensors, metadata }
    }

    pub(crate) fn get(&self, name: &str) -> Tensor {
        self.find(name).unwrap_or_else(|| panic!("{}: no {name}", self.name))
    }

    pub(crate) fn find(&self, name: &str) -> Option<Tensor> {
        self.tensors.get(name).cloned()
    }

    pub(crate) fn scalar(&self, name: &str) -> f64 {
        let value = self.get(name).to_dtype(DType::F64).expect("a number");
        value.to_scalar().expect("one number")
    }

    /// Whole numbers, such as token ids, one row per sequence.
    pub(crate) fn rows(&self, name: &str) -> Vec<Vec<u32>> {
        let rows = self.get(name).to_dtype(DType::U32).expect("whole numbers");
        rows.to_vec2().expect("a matrix")
    }

    pub(crate) fn numbers(&self, name: &str) -> Vec<f64> {
        let values = self.get(name).to_dtype(DType::F64).expect("numbers");
        values.flatten_all().and_then(|v| v.to_vec1()).expect("a vector")
    }

    pub(crate) fn metadata<T: serde::de::DeserializeOwned>(&self, key: &str) -> T {
        let text = self.metadata.get(key).unwrap_or_else(|| panic!("{}: no metadata {key}", self.name));
        serde_json::from_str(text).unwrap_or_else(|error| panic!("{}: {key}: {error}", self.name))
    }

    /// The model's weights, those whose names begin with `prefix`, without it.
    pub(crate) fn weights(&self, prefix: &str, place: &Place) -> Weights {
        let prefix = format!("weight.{prefix}");
        let chosen = self
            .tensors
            .iter()
            .filter_map(|(name, tensor)| Some((name.strip_prefix(&prefix)?.to_string(), tensor.clone())));
        Weights::from_tensors(chosen.collect(), &place.device).computing_in(place.precision())
    }

    /// Checks the gradient of every weight that was handed out against `grad.<case>.<prefix><name>`.
    ///
    /// Every one must have a gradient; those that the reference found to be rounding noise about zero are not compared.
    /// Where the place compares none, they must be finite.
    pub(crate) fn check_gradients(&self, case: &str, prefix: &str, weights: &Weights, place: &Place) {
        let zero: HashMap<String, HashSet<String>> = self.metadata("zero");
        let part = case.split('.').next().expect("a case");
        let key = |name: &str| match case.split_once('.') {
            Some((_, rest)) => format!("{rest}.{prefix}{name}"),
            None => format!("{prefix}{name}"),
        };
        let mut n_compared = 0;
        for (name, param) in weights.params() {
            let grad = param.grad().unwrap_or_else(|| panic!("{name} got no gradient"));
            let wanted = self.get(&format!("grad.{case}.{prefix}{name}"));
            if !zero[part].contains(&key(&name)) {
                place.check_gradient(&format!("{} grad.{case}.{name}", self.name), &grad, &wanted);
                n_compared += 1;
            }
        }
        assert!(n_compared > 0, "nothing was compared");
    }
}

/// A weight whose gradient can be asked for.
pub(crate) fn trained(name: &str, value: &Tensor) -> Param {
    Param::new(name, value.clone(), true).expect("a parameter")
}

/// An input whose gradient can be asked for.
pub(crate) fn variable(value: &Tensor) -> Var {
    Var::from_tensor(value).expect("a variable")
}

/// Fails unless `actual` is within `tolerance` of `wanted`, in the norm of the whole and in its largest element.
pub(crate) fn assert_close(what: &str, actual: &Tensor, wanted: &Tensor, tolerance: f64) {
    assert_eq!(actual.dims(), wanted.dims(), "{what}: shape");
    let flat = |t: &Tensor| -> Vec<f64> {
        let t = t.to_device(&Device::Cpu).and_then(|t| t.to_dtype(DType::F64)?.flatten_all());
        t.and_then(|t| t.to_vec1()).expect("numbers")
    };
    let (actual, wanted) = (flat(actual), flat(wanted));
    let norm = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
    let largest = |v: &[f64]| v.iter().fold(0.0_f64, |most, x| most.max(x.abs()));
    let difference: Vec<f64> = actual.iter().zip(&wanted).map(|(a, w)| a - w).collect();
    let (of_norm, of_largest) =
        (norm(&difference) / norm(&wanted).max(1e-30), largest(&difference) / largest(&wanted).max(1e-30));
    eprintln!("{what}: off by {of_norm:.2e} of the norm"); // the runner keeps it unless it is asked
    assert!(
        of_norm <= tolerance && of_largest <= tolerance,
        "{what}: off by {of_norm:.2e} of the norm and {of_largest:.2e} of the largest element, allowed {tolerance:.0e}"
    );
}

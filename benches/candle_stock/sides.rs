//! A model in our implementation and in the stock one: run, timed, compared.

use std::time::Instant;

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use hypnos::ml::Result;
use hypnos::ml::param::Param;

use super::cases::Pass;
use super::inputs::normal;

/// One model in both implementations, with the same weights and inputs.
pub(super) struct Pair {
    pub(super) ours: Side,
    pub(super) stock: Side,
}

pub(super) struct Side {
    forward: Box<dyn Fn() -> candle_core::Result<Tensor>>,
    /// What a backward measures the output against; in a forward there is none.
    target: Option<Tensor>,
    trained: Trained,
}

/// What may get a gradient.
pub(super) enum Trained {
    Params(Vec<Param>),
    Vars(Vec<Var>),
}

/// What a run leaves, so that its time holds no freeing.
struct Run {
    output: Tensor,
    gradients: Option<GradStore>,
}

impl Pair {
    /// Both with a target for the output of ours, if there is to be a backward.
    pub(super) fn new(
        pass: Pass,
        ours: impl Fn() -> candle_core::Result<Tensor> + 'static,
        stock: impl Fn() -> candle_core::Result<Tensor> + 'static,
        trained: (Trained, Trained),
    ) -> Result<Self> {
        let target = match pass {
            Pass::Forward => None,
            Pass::Backward => Some(normal("target", ours()?.dims(), 1.0, &Device::Cpu)?),
        };
        let ours = Side { forward: Box::new(ours), target: target.clone(), trained: trained.0 };
        Ok(Self { ours, stock: Side { forward: Box::new(stock), target, trained: trained.1 } })
    }
}

impl Side {
    fn run(&self) -> Result<Run> {
        let output = (self.forward)()?;
        let distance = |target: &Tensor| (&output - target)?.sqr()?.mean_all();
        let loss = self.target.as_ref().map(distance).transpose()?;
        let gradients = loss.map(|loss| loss.backward()).transpose()?;
        Ok(Run { output, gradients })
    }

    /// How many of the trained tensors got a gradient in this run. Forgets those that lie in the weights themselves.
    fn take_gradients(&self, run: &Run) -> usize {
        match &self.trained {
            Trained::Params(params) => params.iter().filter(|param| param.take_grad().is_some()).count(),
            Trained::Vars(vars) => {
                let has = |var: &&Var| run.gradients.as_ref().is_some_and(|all| all.get(var).is_some());
                vars.iter().filter(has).count()
            }
        }
    }

    fn n_trained(&self) -> usize {
        match &self.trained {
            Trained::Params(params) => params.len(),
            Trained::Vars(vars) => vars.len(),
        }
    }

    /// Seconds of one run, the mean of `n`.
    pub(super) fn measure(&self, n: usize) -> Result<f64> {
        let mut seconds = 0.0;
        for _ in 0..n {
            let start = Instant::now();
            let run = self.run()?;
            seconds += start.elapsed().as_secs_f64();
            self.take_gradients(&run);
        }
        Ok(seconds / n as f64)
    }
}

/// How far the outputs are apart, and the gradients: stock / ours / all. Serves as the first warm-up.
pub(super) fn compare(ours: &Side, stock: &Side) -> Result<(f32, String)> {
    let (our_run, stock_run) = (ours.run()?, stock.run()?);
    let largest = |x: &Tensor| x.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
    let apart = largest(&(&our_run.output - &stock_run.output)?)? / largest(&our_run.output)?;
    let n_ours = ours.take_gradients(&our_run);
    let gradients = match ours.target {
        None => String::new(),
        Some(_) => format!("{} / {n_ours} / {}", stock.take_gradients(&stock_run), ours.n_trained()),
    };
    Ok((apart, gradients))
}

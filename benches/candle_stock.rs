//! Benchmark of Stable Diffusion 1.5's models, ours beside candle-transformers, the stock implementation on the same
//! tensor library: times, how far the outputs are apart, and how many weights get a gradient.
//!
//! ```sh
//! cargo bench --bench candle_stock -- [--only SUBSTRING] [--repeats 5]
//! ```
//!
//! Method, as that of `hypnos bench`. Both sides have the same seeded random weights, run in one process with the
//! allocator of the program, and use the same number of threads. After a warm-up they take turns: ours, stock, ours,
//! stock. Before each measurement both are idle for 50 ms. Short cases are run several times in a measurement, as often
//! on both sides, so that one lasts 50 ms or more. A time holds no building of inputs and no freeing of results.
//! `ratio` is our median over theirs, `paired` the median of the ratios of neighbouring measurements, `fastest` the
//! ratio of the shortest times. `others` is the share of the machine that other programs took: above a few per cent the
//! ratios are not worth quoting. `apart` is the largest difference of the outputs over the largest element of ours. A
//! case that needs more memory than is free is left out. f32 on the CPU.
//!
//! What candle-transformers 0.11.1 cannot do decides the cases:
//!
//! * Its text encoder takes one prompt at a time, its UNet one timestep for a batch.
//! * Its autoencoder is wrong for more than one picture at a time on a CPU (huggingface/candle#3744): one is decoded.
//! * Its UNet has the tanh approximation of GELU in place of GELU, hence `apart` of about 1e-4.
//! * Its layer norms, and the softmax of the UNet's attentions, have no backward. `loss.backward()` succeeds all the
//!   same: the graph ends there silently, so weights behind them get no gradient, or that of the residual paths alone.
//!   `gradients` counts the trained tensors that got one, right or wrong, as stock / ours / all. Its text encoder ends
//!   with a layer norm and gets none at all. So `fwd+bwd` compares our whole backward with a part of one; only the
//!   autoencoder's, to the latents through frozen weights, is whole on both sides.
#![allow(clippy::print_stdout)] // the table is what it is for

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::time::{Duration, Instant};

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::models::stable_diffusion::clip as stock_clip;
use candle_transformers::models::stable_diffusion::unet_2d::{
    UNet2DConditionModel, UNet2DConditionModelConfig,
};
use candle_transformers::models::stable_diffusion::vae::{AutoEncoderKL, AutoEncoderKLConfig};
use clap::Parser;
use hypnos::ml::models::clip::{self, ClipText};
use hypnos::ml::models::unet::{self, Unet};
use hypnos::ml::models::vae::{self, Vae};
use hypnos::ml::param::Param;
use hypnos::ml::weights::Weights;
use hypnos::ml::{Error, Result, random};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// All weights and inputs are drawn from it.
const SEED: u64 = 15;

/// Idle time before each measurement.
const QUIET: Duration = Duration::from_millis(50);

/// A measurement lasts at least this long, by repetition.
const SHORTEST_SECS: f64 = 0.05;

/// Runs of one measurement at most.
const MOST_RUNS: f64 = 1000.0;

/// Measures our models beside those of candle-transformers.
#[derive(Parser)]
struct Args {
    /// Measure only cases that have this in their names.
    #[arg(long, value_name = "SUBSTRING")]
    only: Option<String>,
    /// Measurements of each case on each side.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeats: u32,
    /// What `cargo bench` says to every benchmark.
    #[arg(long = "bench", hide = true)]
    _bench: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    hypnos::memory::keep_freed();
    let threads = rayon::current_num_threads();
    println!(
        "f32 on the CPU, {threads} threads each, {} repeats. Times: min / median / max.\n",
        args.repeats
    );
    println!("| case | ours, ms | stock, ms | ratio | paired | fastest | apart | gradients | others |");
    println!("|---|--:|--:|--:|--:|--:|--:|--:|--:|");
    for case in cases() {
        if args.only.as_ref().is_none_or(|part| case.name.contains(part.as_str())) {
            println!("{}", row(&case, args.repeats as usize)?);
        }
    }
    Ok(())
}

/// One row of the table.
struct Case {
    name: &'static str,
    /// Memory that both sides take together at their peak, GiB, roughly.
    gib: f64,
    build: fn(Pass) -> Result<Pair>,
    pass: Pass,
}

/// How far a case goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    /// The output, with frozen weights.
    Forward,
    /// The output, then the gradients of its mean squared distance from noise.
    Backward,
}

fn cases() -> Vec<Case> {
    vec![
        case("text-encoder/fwd", 1.5, Pass::Forward, text_encoder),
        case("text-encoder/fwd+bwd", 3.0, Pass::Backward, text_encoder),
        case("unet-32-b2/fwd", 6.0, Pass::Forward, |pass| unet([2, 4, 32, 32], pass)),
        case("unet-64-b2/fwd", 9.0, Pass::Forward, |pass| unet([2, 4, 64, 64], pass)),
        case("unet-32-b1/fwd+bwd", 18.0, Pass::Backward, |pass| unet([1, 4, 32, 32], pass)),
        case("vae-decode-32/fwd", 4.0, Pass::Forward, vae_decode),
        case("vae-decode-32/fwd+bwd", 10.0, Pass::Backward, vae_decode),
    ]
}

fn case(name: &'static str, gib: f64, pass: Pass, build: fn(Pass) -> Result<Pair>) -> Case {
    Case { name, gib, build, pass }
}

/// One model in both implementations, with the same weights and inputs.
struct Pair {
    ours: Side,
    stock: Side,
}

struct Side {
    forward: Box<dyn Fn() -> candle_core::Result<Tensor>>,
    /// What a backward measures the output against; in a forward there is none.
    target: Option<Tensor>,
    trained: Trained,
}

/// What may get a gradient.
enum Trained {
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
    fn new(
        pass: Pass,
        ours: impl Fn() -> candle_core::Result<Tensor> + 'static,
        stock: impl Fn() -> candle_core::Result<Tensor> + 'static,
        trained: (Trained, Trained),
    ) -> Result<Self> {
        let target = match pass {
            Pass::Forward => None,
            Pass::Backward => Some(normal("target", ours()?.dims())?),
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
    fn measure(&self, n: usize) -> Result<f64> {
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

/// The text encoder, CLIP ViT-L/14's, on one prompt.
fn text_encoder(pass: Pass) -> Result<Pair> {
    let sizes: clip::Config = config(json!({
        "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    }))?;
    let weights = Weights::random(SEED, &Device::Cpu).trainable(pass == Pass::Backward);
    let ours = ClipText::load(&weights, &sizes)?;
    let (builder, trained) = share(&weights.params(), pass)?;
    let stock = stock_clip::ClipTextTransformer::new(builder, &stock_clip::Config::v1_5())?;
    let ids: Vec<u32> = (0..77).map(|i| random::below(SEED, 0, i, sizes.vocab_size) as u32).collect();
    let ids_tensor = Tensor::from_vec(ids.clone(), (1, 77), &Device::Cpu)?;
    let ids = [ids];
    let stock = move || stock.forward_with_mask(&ids_tensor, usize::MAX);
    Pair::new(pass, move || ours.forward(&ids), stock, trained)
}

/// The UNet on latents of this shape.
fn unet(latents: [usize; 4], pass: Pass) -> Result<Pair> {
    let sizes: unet::Config = config(json!({
        "in_channels": 4, "out_channels": 4, "sample_size": 64, "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2, "attention_head_dim": 8, "cross_attention_dim": 768, "norm_num_groups": 32,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    }))?;
    let weights = Weights::random(SEED, &Device::Cpu).trainable(pass == Pass::Backward);
    let ours = Unet::load(&weights, &sizes)?;
    let (builder, trained) = share(&weights.params(), pass)?;
    // Its default is SD 1.5's but for the width of the text.
    let stock = UNet2DConditionModelConfig { cross_attention_dim: 768, ..Default::default() };
    let stock = UNet2DConditionModel::new(builder, 4, 4, false, stock)?;
    let (x, text) = (normal("latents", &latents)?, normal("text", &[latents[0], 77, 768])?);
    let (same_x, same_text, t) = (x.clone(), text.clone(), vec![500.0; latents[0]]);
    let stock = move || stock.forward(&same_x, 500.0, &same_text);
    Pair::new(pass, move || ours.forward(&x, &t, &text), stock, trained)
}

/// The autoencoder's decoder: its weights are frozen, and a backward goes to the latents.
fn vae_decode(pass: Pass) -> Result<Pair> {
    let sizes: vae::Config = config(json!({
        "latent_channels": 4, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
        "norm_num_groups": 32, "scaling_factor": 0.18215,
    }))?;
    let weights = Weights::random(SEED, &Device::Cpu);
    let ours = Vae::load(&weights, &sizes)?;
    let (builder, _) = share(&weights.params(), Pass::Forward)?;
    let stock = AutoEncoderKLConfig {
        block_out_channels: vec![128, 256, 512, 512],
        layers_per_block: 2,
        latent_channels: 4,
        norm_num_groups: 32,
        use_quant_conv: true,
        use_post_quant_conv: true,
    };
    let stock = AutoEncoderKL::new(builder, 3, 3, stock)?;
    let latents = normal("latents", &[1, 4, 32, 32])?;
    let vars = (Var::from_tensor(&latents)?, Var::from_tensor(&latents)?);
    let trained = (Trained::Vars(vec![vars.0.clone()]), Trained::Vars(vec![vars.1.clone()]));
    // Inputs that are no variables keep a forward from recording its graph.
    let input = |var: Var| if pass == Pass::Forward { latents.clone() } else { var.into_inner() };
    let (our_input, stock_input) = (input(vars.0), input(vars.1));
    let stock = move || stock.decode(&(&stock_input / 0.18215)?);
    Pair::new(pass, move || ours.decode(&our_input), stock, trained)
}

/// Our weights as candle-transformers takes them, and what of both sides may get a gradient: all weights in a backward,
/// theirs being copies as variables; in a forward the two share them.
fn share(params: &BTreeMap<String, Param>, pass: Pass) -> Result<(VarBuilder<'static>, (Trained, Trained))> {
    let shaped = |name: &str, value: Tensor| {
        // The projections around a transformer are matrices here and kernels of one pixel there.
        let kernel = name.ends_with("proj_in.weight") || name.ends_with("proj_out.weight");
        if kernel { value.reshape(((), value.dims()[1], 1, 1)) } else { Ok(value) }
    };
    let mut tensors = HashMap::new();
    for (name, param) in params {
        tensors.insert(name.clone(), shaped(name, param.value())?);
    }
    if pass == Pass::Forward {
        let builder = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        return Ok((builder, (Trained::Params(Vec::new()), Trained::Vars(Vec::new()))));
    }
    let map = VarMap::new();
    let mut all = map.data().lock().map_err(|_| Error::input("the map of variables is poisoned"))?;
    for (name, tensor) in tensors {
        all.insert(name, Var::from_tensor(&tensor)?);
    }
    drop(all);
    let trained = (Trained::Params(params.values().cloned().collect()), Trained::Vars(map.all_vars()));
    Ok((VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu), trained))
}

fn config<T: DeserializeOwned>(value: Value) -> Result<T> {
    serde_json::from_value(value).map_err(|error| Error::input(format!("config: {error}")))
}

fn normal(label: &str, dims: &[usize]) -> Result<Tensor> {
    let values = random::normal(random::derive(SEED, label), 0, dims.iter().product());
    Ok(Tensor::from_vec(values, dims, &Device::Cpu)?)
}

/// Measures a case.
fn row(case: &Case, repeats: usize) -> Result<String> {
    let name = case.name;
    let free = available_gib().unwrap_or(f64::INFINITY);
    if case.gib > free {
        return Ok(format!(
            "| {name} | left out: needs {:.0} GiB, {free:.1} are free | | | | | | | |",
            case.gib
        ));
    }
    let Pair { ours, stock } = (case.build)(case.pass)?;
    let (apart, gradients) = compare(&ours, &stock)?;
    let before = Ticks::now();
    let n_runs = n_runs(warm_up(&ours)?.min(warm_up(&stock)?));
    let (mut our_secs, mut stock_secs) = (Vec::new(), Vec::new());
    for _ in 0..repeats {
        for (side, seconds) in [(&ours, &mut our_secs), (&stock, &mut stock_secs)] {
            std::thread::sleep(QUIET);
            seconds.push(side.measure(n_runs)?);
        }
    }
    let others = Ticks::now().zip(before).map(|(now, before)| now.others_since(&before));
    let others = others.map_or("unknown".into(), |share| format!("{:.0} %", 100.0 * share));
    let pairs: Vec<f64> = our_secs.iter().zip(&stock_secs).map(|(ours, stock)| ours / stock).collect();
    let (ours, stock) = (Spread::of(&our_secs), Spread::of(&stock_secs));
    let (ratio, paired, fastest) =
        (ours.median / stock.median, Spread::of(&pairs).median, ours.min / stock.min);
    Ok(format!(
        "| {name} | {} | {} | {ratio:.2} | {paired:.2} | {fastest:.2} | {apart:.0e} | {gradients} | {others} |",
        ours.words(),
        stock.words(),
    ))
}

/// How far the outputs are apart, and the gradients: stock / ours / all. Serves as the first warm-up.
fn compare(ours: &Side, stock: &Side) -> Result<(f32, String)> {
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

/// Seconds of a run that is not the first.
fn warm_up(side: &Side) -> Result<f64> {
    let first = side.measure(1)?;
    if first < SHORTEST_SECS { side.measure(1) } else { Ok(first) }
}

/// Runs that make one measurement, where one run takes `seconds`.
fn n_runs(seconds: f64) -> usize {
    (SHORTEST_SECS / seconds.max(1e-9)).ceil().clamp(1.0, MOST_RUNS) as usize
}

/// Smallest, middle and largest.
struct Spread {
    min: f64,
    median: f64,
    max: f64,
}

impl Spread {
    fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len() - 1;
        let median = f64::midpoint(sorted[last / 2], sorted[sorted.len() / 2]);
        Self { min: sorted[0], median, max: sorted[last] }
    }

    /// In milliseconds.
    fn words(&self) -> String {
        [self.min, self.median, self.max].map(|seconds| format!("{:.1}", 1e3 * seconds)).join(" / ")
    }
}

/// GiB that new programs may take, where the system says so.
fn available_gib() -> Option<f64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let kib = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?.trim().strip_suffix(" kB")?;
    Some(kib.parse::<f64>().ok()? / f64::from(1 << 20))
}

/// Processor time since the machine was started, in the kernel's ticks; on Linux alone.
struct Ticks {
    all: u64,
    idle: u64,
    own: u64,
}

impl Ticks {
    fn now() -> Option<Self> {
        let machine = fs::read_to_string("/proc/stat").ok()?;
        let fields = machine.lines().next()?.split_whitespace().skip(1).take(8); // what follows is counted in these
        let fields = fields.map(|field| field.parse().ok()).collect::<Option<Vec<u64>>>()?;
        let process = fs::read_to_string("/proc/self/stat").ok()?;
        let (_, process) = process.rsplit_once(')')?; // a name may hold anything
        let own = process.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().ok());
        Some(Self {
            all: fields.iter().sum(),
            idle: fields.get(3)? + fields.get(4)?,
            own: own.sum::<Option<u64>>()?,
        })
    }

    /// Share of the machine that others took since `before`, 0..1.
    fn others_since(&self, before: &Self) -> f64 {
        let since = |now: u64, before: u64| now.saturating_sub(before) as f64;
        let busy = since(self.all, before.all) - since(self.idle, before.idle);
        ((busy - since(self.own, before.own)) / since(self.all, before.all).max(1.0)).clamp(0.0, 1.0)
    }
}

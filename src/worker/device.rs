//! One thread that owns one device: it trains, and between two steps of a training it draws what waits.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};

use tokio::sync::oneshot;
use tracing::error;

use crate::engine::{Artist, Beat, ClassImages, DrawInput, Drawn, Ending, Engine, Flow, TrainInput};
use crate::job::{Fault, FaultCode, SampleSpec, TrainSpec};

/// Makes the engine of a device, on the device's own thread; made anew after a panic.
pub type MakeEngine = Box<dyn Fn() -> Result<Box<dyn Engine>, Fault> + Send>;

/// What a device is asked to do.
pub(super) enum Order {
    /// Which class images a training wants.
    Plan { spec: TrainSpec, reply: oneshot::Sender<Result<ClassImages, Fault>> },
    /// A training. One at a time: a second waits for the first to end.
    Train(TrainOrder),
    /// Pictures. Drawn between two steps of a training.
    Draw(DrawOrder),
}

pub(super) struct TrainOrder {
    pub(super) spec: TrainSpec,
    pub(super) photos: Vec<Vec<u8>>,
    pub(super) class_images: Vec<Option<Vec<u8>>>,
    pub(super) resume: Option<PathBuf>,
    pub(super) scratch: PathBuf,
    /// Hears every beat and says how to go on.
    pub(super) watch: Box<dyn FnMut(Beat) -> Flow + Send>,
    pub(super) reply: oneshot::Sender<Result<Ending, Fault>>,
}

pub(super) struct DrawOrder {
    pub(super) spec: SampleSpec,
    pub(super) train: TrainSpec,
    pub(super) weights: PathBuf,
    pub(super) weights_sha256: String,
    pub(super) watch: Box<dyn FnMut(u64, u64) -> Flow + Send>,
    pub(super) reply: oneshot::Sender<Result<Option<Vec<Drawn>>, Fault>>,
}

/// The way to a device's thread.
#[derive(Clone, Debug)]
pub(super) struct Device(Sender<Order>);

impl Device {
    /// Starts a device's thread and waits until its engine is made. Gives the way to it and its bundle's hash.
    pub(super) async fn start(name: &str, make: MakeEngine) -> Result<(Self, String), Fault> {
        let (orders, inbox) = channel();
        let (ready, made) = oneshot::channel();
        let thread = std::thread::Builder::new().name(format!("device {name}"));
        thread
            .spawn(move || run(&make, &inbox, ready))
            .map_err(|error| Fault::new(FaultCode::Machine, format!("no thread for the device: {error}")))?;
        Ok((Self(orders), reply(made).await?))
    }

    pub(super) async fn class_images(&self, spec: &TrainSpec) -> Result<ClassImages, Fault> {
        let (sender, answer) = oneshot::channel();
        self.send(Order::Plan { spec: spec.clone(), reply: sender });
        reply(answer).await
    }

    /// Hands over an order. A device that is gone drops it, and with it the order's reply.
    pub(super) fn send(&self, order: Order) {
        let _ = self.0.send(order); // whoever waits for the reply sees that it is gone
    }
}

/// The answer of a device, which may have died before it gave one.
pub(super) async fn reply<T>(answer: oneshot::Receiver<Result<T, Fault>>) -> Result<T, Fault> {
    answer.await.unwrap_or_else(|_| Err(Fault::new(FaultCode::Machine, "the device's thread has ended")))
}

fn run(make: &MakeEngine, inbox: &Receiver<Order>, ready: oneshot::Sender<Result<String, Fault>>) {
    let mut engine = match make() {
        Ok(engine) => {
            let _ = ready.send(Ok(engine.bundle().to_owned())); // nobody waits: the orders' side is gone as well
            engine
        }
        Err(fault) => {
            let _ = ready.send(Err(fault));
            return;
        }
    };
    while let Ok(order) = inbox.recv() {
        if catch_unwind(AssertUnwindSafe(|| carry_out(engine.as_mut(), order, inbox))).is_ok() {
            continue;
        }
        error!("the engine panicked; it is made anew");
        match make() {
            Ok(fresh) => engine = fresh,
            Err(fault) => {
                error!("the engine cannot be made anew: {fault}");
                return;
            }
        }
    }
}

fn carry_out(engine: &mut dyn Engine, order: Order, inbox: &Receiver<Order>) {
    match order {
        Order::Plan { spec, reply } => answer(reply, || Ok(engine.class_images(&spec))),
        Order::Draw(order) => draw(engine, order),
        Order::Train(order) => {
            let TrainOrder { spec, photos, class_images, resume, scratch, mut watch, reply } = order;
            let input = TrainInput {
                spec: &spec,
                photos: &photos,
                class_images,
                resume: resume.as_deref(),
                scratch: &scratch,
                trace: None,
            };
            let mut later = Vec::new();
            answer(reply, || {
                engine.train(input, &mut |artist, beat| {
                    for waiting in inbox.try_iter() {
                        match waiting {
                            Order::Draw(order) => draw(artist, order),
                            other => later.push(other),
                        }
                    }
                    watch(beat)
                })
            });
            for order in later {
                carry_out(engine, order, inbox);
            }
        }
    }
}

fn draw<A: Artist + ?Sized>(artist: &mut A, order: DrawOrder) {
    let DrawOrder { spec, train, weights, weights_sha256, mut watch, reply } = order;
    let input = DrawInput { spec: &spec, train: &train, weights: &weights, weights_sha256: &weights_sha256 };
    answer(reply, || artist.draw(&input, &mut watch));
}

/// Sends what `work` gives, also where it panics: the job's task must not wait for ever. The panic goes on, since the
/// engine may be broken inside.
fn answer<T>(reply: oneshot::Sender<Result<T, Fault>>, work: impl FnOnce() -> Result<T, Fault>) {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => {
            let _ = reply.send(result); // nobody waits: the job was lost meanwhile
        }
        Err(panic) => {
            let _ = reply.send(Err(Fault::new(FaultCode::Internal, "the engine panicked")));
            std::panic::resume_unwind(panic);
        }
    }
}

//! One thread that owns one device: it trains, and between two steps of a training it draws what waits, a batch at a
//! time, for as long as the samples' share allows.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, error::TryRecvError, unbounded_channel};
use tokio::sync::oneshot;
use tracing::{error, warn};

use super::shares::{Account, Clock, Meter};
use crate::clock;
use crate::engine::{Artist, Beat, ClassImages, DrawInput, Drawn, Ending, Engine, Flow, TrainInput};
use crate::job::{Fault, FaultCode, SampleSpec, TrainSpec};

/// Makes the engine of a device, on the device's own thread; made anew after a panic.
pub type MakeEngine = Box<dyn Fn() -> Result<Box<dyn Engine>, Fault> + Send>;

/// How long a device without a training holds samples back for one that has asked for its plan and will be there any
/// moment, with its files.
const EXPECTED: Duration = Duration::from_secs(5);

/// What a device is asked to do.
pub(super) enum Order {
    /// Which class images a training wants. That training follows.
    Plan { spec: TrainSpec, reply: oneshot::Sender<Result<ClassImages, Fault>> },
    /// A training. One at a time: a second waits for the first to end.
    Train(TrainOrder),
    /// Pictures. Drawn between two steps of a training.
    Draw(DrawOrder),
    /// Something small, to see whether it works. An engine that is gone is made anew first.
    Probe(oneshot::Sender<Result<(), Fault>>),
}

pub(super) struct TrainOrder {
    pub(super) spec: TrainSpec,
    pub(super) photos: Vec<Vec<u8>>,
    pub(super) class_images: Vec<Option<Vec<u8>>>,
    pub(super) resume: Option<PathBuf>,
    pub(super) scratch: PathBuf,
    /// Hears every beat and says how to go on.
    pub(super) watch: Box<dyn FnMut(Beat) -> Flow + Send>,
    pub(super) meter: Arc<Meter>,
    pub(super) reply: oneshot::Sender<Result<Ending, Fault>>,
}

pub(super) struct DrawOrder {
    pub(super) spec: SampleSpec,
    pub(super) train: TrainSpec,
    pub(super) weights: PathBuf,
    pub(super) weights_sha256: String,
    /// Its tenant's turn and weight when it was claimed: of several samples the one with the earliest turn goes on.
    pub(super) turn: i64,
    pub(super) weight: i64,
    /// Pictures that no batch was begun for yet, which tells whoever claims whether the device needs more.
    pub(super) left: Arc<AtomicUsize>,
    /// Hears of steps done and steps in all.
    pub(super) watch: Box<dyn FnMut(u64, u64) + Send>,
    /// Whether anybody still wants it; looked at between any two steps.
    pub(super) is_wanted: Box<dyn Fn() -> bool + Send>,
    pub(super) meter: Arc<Meter>,
    /// `None` if nobody wanted it any more.
    pub(super) reply: oneshot::Sender<Result<Option<Vec<Drawn>>, Fault>>,
}

/// The way to a device's thread.
#[derive(Clone, Debug)]
pub(super) struct Device {
    orders: UnboundedSender<Order>,
    account: Account,
    clock: Clock,
    is_whole: Arc<AtomicBool>,
}

impl Device {
    /// Starts a device's thread and waits until its engine is made. Gives the way to it and its bundle's hash.
    pub(super) async fn start(
        name: &str,
        make: MakeEngine,
        share: f64,
        clock: Clock,
    ) -> Result<(Self, String), Fault> {
        let (orders, inbox) = unbounded_channel();
        let (ready, made) = oneshot::channel();
        let account = Account::new(share, clock.now());
        let is_whole = Arc::new(AtomicBool::new(true));
        let desk = Desk::new(inbox, account.clone(), clock.clone());
        let whole = is_whole.clone();
        std::thread::Builder::new()
            .name(format!("device {name}"))
            .spawn(move || Thread { make, engine: None, desk, is_whole: whole }.run(ready))
            .map_err(|error| Fault::new(FaultCode::Machine, format!("no thread for the device: {error}")))?;
        Ok((Self { orders, account, clock, is_whole }, reply(made).await?))
    }

    pub(super) async fn class_images(&self, spec: &TrainSpec) -> Result<ClassImages, Fault> {
        let (sender, answer) = oneshot::channel();
        self.send(Order::Plan { spec: spec.clone(), reply: sender });
        reply(answer).await
    }

    /// Has the device do something small, and its engine made anew first if that is gone.
    pub(super) async fn probe(&self) -> Result<(), Fault> {
        let (sender, answer) = oneshot::channel();
        self.send(Order::Probe(sender));
        reply(answer).await
    }

    /// Whether there is an engine that orders can go to.
    pub(super) fn is_whole(&self) -> bool {
        self.is_whole.load(Ordering::Acquire)
    }

    /// How long another sample would wait for the share of a training that is under way.
    pub(super) fn sample_wait(&self) -> Duration {
        self.account.wait(self.clock.now())
    }

    /// Hands over an order. A device that is gone drops it, and with it the order's reply.
    pub(super) fn send(&self, order: Order) {
        let _ = self.orders.send(order); // whoever waits for the reply sees that it is gone
    }
}

/// The answer of a device, which may have died before it gave one.
pub(super) async fn reply<T>(answer: oneshot::Receiver<Result<T, Fault>>) -> Result<T, Fault> {
    answer.await.unwrap_or_else(|_| Err(Fault::new(FaultCode::Machine, "the device's thread has ended")))
}

/// What waits for the device.
struct Desk {
    inbox: UnboundedReceiver<Order>,
    /// Whether more may come.
    is_open: bool,
    samples: Vec<Drawing>,
    trainings: VecDeque<TrainOrder>,
    plans: VecDeque<(TrainSpec, oneshot::Sender<Result<ClassImages, Fault>>)>,
    probes: Vec<oneshot::Sender<Result<(), Fault>>>,
    /// Until when samples are held back for a training that is about to come.
    expected: Option<Instant>,
    account: Account,
    clock: Clock,
}

/// A sample, some of its pictures drawn.
struct Drawing {
    order: DrawOrder,
    drawn: Vec<Drawn>,
}

impl Drawing {
    /// Where its tenant stands, with what this sample has used.
    fn turn(&self) -> i64 {
        let used = self.order.meter.total().as_micros() as i64;
        self.order.turn.saturating_add(used / self.order.weight.max(1))
    }
}

/// An engine that is not to be used any more, and whom to tell that it panicked under their order: nobody if it said by
/// itself that its device is lost.
#[derive(Default)]
struct Broken(Vec<Box<dyn FnOnce(Fault) + Send>>);

impl Broken {
    fn under<T: Send + 'static>(reply: oneshot::Sender<Result<T, Fault>>) -> Self {
        Self(vec![Box::new(move |fault| answer(reply, Err(fault)))])
    }
}

/// Answers whoever gave an order. Nobody waits if the job was lost meanwhile.
fn answer<T>(reply: oneshot::Sender<Result<T, Fault>>, result: Result<T, Fault>) {
    let _ = reply.send(result);
}

/// Answers with what an engine said or did. It is broken if it panicked, which is answered later, or lost its device.
fn pass_on<T: Send + 'static>(
    reply: oneshot::Sender<Result<T, Fault>>,
    outcome: std::thread::Result<Result<T, Fault>>,
) -> Result<(), Broken> {
    let Ok(result) = outcome else { return Err(Broken::under(reply)) };
    let is_lost = result.as_ref().is_err_and(|fault| fault.device_lost);
    answer(reply, result);
    if is_lost { Err(Broken::default()) } else { Ok(()) }
}

/// Whether the device computes.
fn probed(artist: &mut dyn Artist) -> Result<(), Fault> {
    caught(|| artist.probe())
        .unwrap_or_else(|_| Err(Fault::device_lost("the engine panicked when it was probed")))
}

fn caught<T>(work: impl FnOnce() -> T) -> std::thread::Result<T> {
    catch_unwind(AssertUnwindSafe(work))
}

impl Desk {
    fn new(inbox: UnboundedReceiver<Order>, account: Account, clock: Clock) -> Self {
        Self {
            inbox,
            is_open: true,
            samples: Vec::new(),
            trainings: VecDeque::new(),
            plans: VecDeque::new(),
            probes: Vec::new(),
            expected: None,
            account,
            clock,
        }
    }

    /// Waits until there is something to do; `false` when nothing will be any more.
    fn wait(&mut self) -> bool {
        loop {
            self.look();
            let now = clock::now();
            self.expected = self.expected.filter(|until| *until > now);
            let may_draw = !self.samples.is_empty() && self.expected.is_none();
            if may_draw || !(self.trainings.is_empty() && self.plans.is_empty() && self.probes.is_empty()) {
                return true;
            }
            if !self.is_open {
                return false; // a sample that is held back was given up with everything else
            }
            let limit = self.expected.filter(|_| !self.samples.is_empty()).map(|until| until - now);
            match clock::receive(&mut self.inbox, limit) {
                Ok(Some(order)) => self.put(order),
                Ok(None) => self.is_open = false,
                Err(clock::TimedOut) => {}
            }
        }
    }

    /// Takes in what has come, and lets go of samples that nobody wants any more.
    fn look(&mut self) {
        loop {
            match self.inbox.try_recv() {
                Ok(order) => self.put(order),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    self.is_open = false;
                    break;
                }
            }
        }
        for unwanted in self.samples.extract_if(.., |sample| !(sample.order.is_wanted)()) {
            answer(unwanted.order.reply, Ok(None));
        }
    }

    fn put(&mut self, order: Order) {
        match order {
            Order::Plan { spec, reply } => self.plans.push_back((spec, reply)),
            Order::Train(order) => {
                self.expected = None;
                self.trainings.push_back(order);
            }
            Order::Draw(order) => self.samples.push(Drawing { order, drawn: Vec::new() }),
            Order::Probe(reply) => self.probes.push(reply),
        }
    }

    /// What is done first of all that waits; nothing of it takes long but a training.
    fn work(&mut self, engine: &mut dyn Engine) -> Result<(), Broken> {
        self.probe(engine)?;
        while let Some((spec, reply)) = self.plans.pop_front() {
            pass_on(reply, caught(|| Ok(engine.class_images(&spec))))?;
            self.expected = Some(clock::now() + EXPECTED);
        }
        match self.trainings.pop_front() {
            Some(order) => self.train(engine, order),
            None if self.expected.is_none() => self.draw(engine),
            None => Ok(()),
        }
    }

    fn probe(&mut self, artist: &mut dyn Artist) -> Result<(), Broken> {
        for reply in self.probes.drain(..) {
            let outcome = probed(artist);
            let is_sound = outcome.is_ok();
            answer(reply, outcome);
            if !is_sound {
                return Err(Broken::default());
            }
        }
        Ok(())
    }

    /// Trains to the end, and draws between two steps.
    fn train(&mut self, engine: &mut dyn Engine, order: TrainOrder) -> Result<(), Broken> {
        let TrainOrder { spec, photos, class_images, resume, scratch, mut watch, meter, reply } = order;
        let resume = resume.as_deref();
        let input =
            TrainInput { spec: &spec, photos: &photos, class_images, resume, scratch: &scratch, trace: None };
        let mut since = self.clock.now();
        self.account.begin(since);
        let mut broken = Ok(());
        let outcome = caught(|| {
            engine.train(input, &mut |artist, beat| {
                let now = self.clock.now();
                self.account.trained(now.saturating_sub(since));
                meter.add(now.saturating_sub(since));
                let mut flow = watch(beat);
                if matches!(flow, Flow::Continue | Flow::Checkpoint) {
                    broken = self.beside(artist);
                    if broken.is_err() {
                        flow = Flow::Stop;
                    }
                }
                since = self.clock.now();
                flow
            })
        });
        let now = self.clock.now();
        meter.add(now.saturating_sub(since));
        self.account.end(now);
        match broken {
            Ok(()) => pass_on(reply, outcome),
            // The engine broke under something else: it goes back to the queue, to go on from its last checkpoint.
            Err(broken) => {
                answer(reply, Ok(Ending::Paused(None)));
                Err(broken)
            }
        }
    }

    /// Between two steps of a training: what is quick, and as many batches as owe it nothing.
    fn beside(&mut self, artist: &mut dyn Artist) -> Result<(), Broken> {
        self.look();
        self.probe(artist)?;
        while !self.samples.is_empty() && self.account.may_draw() {
            self.draw(artist)?;
            self.look();
        }
        Ok(())
    }

    /// Draws one batch of the sample whose turn is the earliest.
    fn draw(&mut self, artist: &mut dyn Artist) -> Result<(), Broken> {
        let turns = self.samples.iter().enumerate();
        let Some((next, _)) = turns.min_by_key(|(_, sample)| sample.turn()) else { return Ok(()) };
        let Drawing { mut order, mut drawn } = self.samples.remove(next);
        let n_pictures = order.spec.pictures().count();
        let n_batch = artist.batch().max(1);
        let pictures = drawn.len()..n_pictures.min(drawn.len() + n_batch);
        let (n_before, n_batches) = (drawn.len().div_ceil(n_batch), n_pictures.div_ceil(n_batch));
        order.left.store(n_pictures - pictures.end, Ordering::Release);

        let began = self.clock.now();
        self.account.draws(began);
        let input = DrawInput {
            spec: &order.spec,
            train: &order.train,
            weights: &order.weights,
            weights_sha256: &order.weights_sha256,
        };
        let outcome = caught(|| {
            artist.draw(&input, pictures, &mut |step, total| {
                (order.watch)(n_before as u64 * total + step, n_batches as u64 * total);
                if (order.is_wanted)() { Flow::Continue } else { Flow::Stop }
            })
        });
        let took = self.clock.now().saturating_sub(began);
        self.account.drew(took);
        order.meter.add(took);

        match outcome {
            Ok(Ok(Some(batch))) if !batch.is_empty() => {
                drawn.extend(batch);
                if drawn.len() < n_pictures {
                    self.samples.push(Drawing { order, drawn });
                } else {
                    answer(order.reply, Ok(Some(drawn)));
                }
                Ok(())
            }
            Ok(Ok(Some(_))) => {
                answer(order.reply, Err(Fault::new(FaultCode::Internal, "the engine drew nothing")));
                Ok(())
            }
            outcome => pass_on(order.reply, outcome),
        }
    }

    /// Answers all that waits for an engine that is not there.
    fn refuse(&mut self) {
        let fault = || Fault::device_lost("the device cannot be used");
        for (_, reply) in self.plans.drain(..) {
            answer(reply, Err(fault()));
        }
        for order in self.trainings.drain(..) {
            answer(order.reply, Err(fault()));
        }
        for sample in self.samples.drain(..) {
            answer(sample.order.reply, Err(fault()));
        }
    }
}

/// The thread itself.
struct Thread {
    make: MakeEngine,
    engine: Option<Box<dyn Engine>>,
    is_whole: Arc<AtomicBool>,
    desk: Desk,
}

impl Thread {
    fn run(mut self, ready: oneshot::Sender<Result<String, Fault>>) {
        let made = self.make();
        let is_made = made.is_ok();
        answer(ready, made);
        while is_made && self.desk.wait() {
            match &mut self.engine {
                Some(engine) => {
                    if let Err(broken) = self.desk.work(engine.as_mut()) {
                        self.replace(broken);
                    }
                }
                None => self.without(),
            }
        }
    }

    /// Makes the engine; its bundle's hash.
    fn make(&mut self) -> Result<String, Fault> {
        let make = &self.make;
        let engine = caught(make)
            .unwrap_or_else(|_| Err(Fault::device_lost("the engine panicked while it was made")))?;
        let bundle = engine.bundle().to_owned();
        self.engine = Some(engine);
        self.is_whole.store(true, Ordering::Release);
        Ok(bundle)
    }

    /// Lets go of an engine that broke. After a panic another is made at once, and by it is decided whose fault that was:
    /// the order's, if the device is well.
    fn replace(&mut self, Broken(waiting): Broken) {
        self.is_whole.store(false, Ordering::Release);
        let old = self.engine.take();
        if caught(|| drop(old)).is_err() {
            warn!("the engine panicked once more when it was let go");
        }
        if waiting.is_empty() {
            return; // the next probe makes another
        }
        error!("the engine panicked; it is made anew");
        let fault = match self.make_and_probe() {
            Ok(()) => Fault::new(FaultCode::Internal, "the engine panicked"),
            Err(fault) => {
                Fault::device_lost(format!("the engine panicked and cannot be made anew: {}", fault.message))
            }
        };
        waiting.into_iter().for_each(|tell| tell(fault.clone()));
    }

    fn make_and_probe(&mut self) -> Result<(), Fault> {
        self.make()?;
        let outcome = self.engine.as_mut().map_or(Ok(()), |engine| probed(engine.as_mut()));
        if outcome.is_err() {
            self.replace(Broken::default());
        }
        outcome
    }

    /// Without an engine a probe makes another, and nothing else is done.
    fn without(&mut self) {
        self.desk.refuse();
        for reply in std::mem::take(&mut self.desk.probes) {
            let outcome = if self.engine.is_some() { Ok(()) } else { self.make_and_probe() };
            answer(reply, outcome);
        }
    }
}

//! The queue of a device: which of the waiting commands it works on next, and how it does them.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{UnboundedReceiver, error::TryRecvError};

use super::command::{Command, DrawCommand, Reply, TrainCommand};
use crate::clock;
use crate::engine::{ClassImages, DrawInput, Ending, Engine, Flow, Image, ImageGenerator, TrainInput};
use crate::job::{Fault, FaultCode, TrainSpec};
use crate::worker::shares::{Account, Clock};

/// How long a device without a training holds samples back for a training that has asked for its plan: it arrives any
/// moment, with its files.
const TRAINING_EXPECTED: Duration = Duration::from_secs(5);

/// What waits for the device.
pub(super) struct DeviceQueue {
    inbox: UnboundedReceiver<Command>,
    /// Whether more commands may come.
    is_open: bool,
    samples: Vec<PendingSample>,
    trainings: VecDeque<TrainCommand>,
    plans: VecDeque<(TrainSpec, Reply<ClassImages>)>,
    probes: Vec<Reply<()>>,
    /// Until when samples are held back for an expected training.
    expected_until: Option<Instant>,
    account: Account,
    clock: Clock,
}

/// A sample of which some images may be drawn already.
struct PendingSample {
    command: DrawCommand,
    drawn: Vec<Image>,
}

impl PendingSample {
    /// The tenant's turn, put off by the device time that this sample has used.
    fn turn(&self) -> i64 {
        let used = self.command.device_time.total().as_micros() as i64;
        self.command.turn.saturating_add(used / self.command.weight.max(1))
    }
}

/// The engine cannot be used any more. Holds the replies to the commands under which it panicked; none if it reported
/// by itself that its device is lost.
#[derive(Default)]
pub(super) struct EngineFailure(pub(super) Vec<Box<dyn FnOnce(Fault) + Send>>);

impl EngineFailure {
    fn under<T: Send + 'static>(reply: Reply<T>) -> Self {
        Self(vec![Box::new(move |fault| send_reply(reply, Err(fault)))])
    }
}

/// Answers a command. Nobody receives the answer if the job was lost meanwhile.
pub(super) fn send_reply<T>(reply: Reply<T>, result: Result<T, Fault>) {
    let _ = reply.send(result);
}

/// Answers a command with what the engine returned. The engine has failed if it panicked, which is answered later, or
/// lost its device.
fn forward<T: Send + 'static>(
    reply: Reply<T>,
    outcome: std::thread::Result<Result<T, Fault>>,
) -> Result<(), EngineFailure> {
    let Ok(result) = outcome else { return Err(EngineFailure::under(reply)) };
    let is_lost = result.as_ref().is_err_and(|fault| fault.device_lost);
    send_reply(reply, result);
    if is_lost { Err(EngineFailure::default()) } else { Ok(()) }
}

/// Whether the device computes.
pub(super) fn probe(generator: &mut dyn ImageGenerator) -> Result<(), Fault> {
    catch_panic(|| generator.probe())
        .unwrap_or_else(|_| Err(Fault::device_lost("the engine panicked when it was probed")))
}

pub(super) fn catch_panic<T>(work: impl FnOnce() -> T) -> std::thread::Result<T> {
    catch_unwind(AssertUnwindSafe(work))
}

impl DeviceQueue {
    pub(super) fn new(inbox: UnboundedReceiver<Command>, account: Account, clock: Clock) -> Self {
        Self {
            inbox,
            is_open: true,
            samples: Vec::new(),
            trainings: VecDeque::new(),
            plans: VecDeque::new(),
            probes: Vec::new(),
            expected_until: None,
            account,
            clock,
        }
    }

    /// Waits until there is something to do; `false` once no command will come any more.
    pub(super) fn wait(&mut self) -> bool {
        loop {
            self.receive_all();
            let now = clock::now();
            self.expected_until = self.expected_until.filter(|until| *until > now);
            let may_draw = !self.samples.is_empty() && self.expected_until.is_none();
            if may_draw || !(self.trainings.is_empty() && self.plans.is_empty() && self.probes.is_empty()) {
                return true;
            }
            if !self.is_open {
                return false; // samples that are held back were given up with everything else
            }
            let limit = self.expected_until.filter(|_| !self.samples.is_empty()).map(|until| until - now);
            match clock::receive(&mut self.inbox, limit) {
                Ok(Some(command)) => self.enqueue(command),
                Ok(None) => self.is_open = false,
                Err(clock::TimedOut) => {}
            }
        }
    }

    /// Enqueues the commands that have arrived, and drops samples that are no longer wanted.
    fn receive_all(&mut self) {
        loop {
            match self.inbox.try_recv() {
                Ok(command) => self.enqueue(command),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    self.is_open = false;
                    break;
                }
            }
        }
        for unwanted in self.samples.extract_if(.., |sample| !(sample.command.is_wanted)()) {
            send_reply(unwanted.command.reply, Ok(None));
        }
    }

    fn enqueue(&mut self, command: Command) {
        match command {
            Command::PlanTraining { spec, reply } => self.plans.push_back((spec, reply)),
            Command::Train(command) => {
                self.expected_until = None;
                self.trainings.push_back(command);
            }
            Command::Draw(command) => self.samples.push(PendingSample { command, drawn: Vec::new() }),
            Command::Probe(reply) => self.probes.push(reply),
        }
    }

    /// Does what comes first: probes and plans, then one training or one batch of a sample.
    pub(super) fn work(&mut self, engine: &mut dyn Engine) -> Result<(), EngineFailure> {
        self.answer_probes(engine)?;
        while let Some((spec, reply)) = self.plans.pop_front() {
            forward(reply, catch_panic(|| Ok(engine.class_images(&spec))))?;
            self.expected_until = Some(clock::now() + TRAINING_EXPECTED);
        }
        match self.trainings.pop_front() {
            Some(command) => self.train(engine, command),
            None if self.expected_until.is_none() => self.draw(engine),
            None => Ok(()),
        }
    }

    fn answer_probes(&mut self, generator: &mut dyn ImageGenerator) -> Result<(), EngineFailure> {
        for reply in self.probes.drain(..) {
            let outcome = probe(generator);
            let works = outcome.is_ok();
            send_reply(reply, outcome);
            if !works {
                return Err(EngineFailure::default());
            }
        }
        Ok(())
    }

    /// Trains to the end, and draws samples between two steps.
    fn train(&mut self, engine: &mut dyn Engine, command: TrainCommand) -> Result<(), EngineFailure> {
        let TrainCommand {
            spec,
            job,
            photos,
            class_images,
            resume,
            scratch,
            mut observer,
            device_time,
            reply,
        } = command;
        let input = TrainInput {
            spec: &spec,
            job: Some(job),
            photos: &photos,
            class_images,
            resume: resume.as_deref(),
            scratch: &scratch,
            trace: None,
        };
        let mut since = self.clock.now();
        self.account.training_began(since);
        let mut failure = Ok(());
        let outcome = catch_panic(|| {
            engine.train(input, &mut |generator, event| {
                let now = self.clock.now();
                self.account.trained(now.saturating_sub(since));
                device_time.add(now.saturating_sub(since));
                let mut flow = observer(event);
                if matches!(flow, Flow::Continue | Flow::Checkpoint) {
                    failure = self.between_steps(generator);
                    if failure.is_err() {
                        flow = Flow::Stop;
                    }
                }
                since = self.clock.now();
                flow
            })
        });
        let now = self.clock.now();
        device_time.add(now.saturating_sub(since));
        self.account.training_ended(now);
        match failure {
            Ok(()) => forward(reply, outcome),
            // The engine failed under another command: the training goes back to the queue and resumes from its last
            // checkpoint.
            Err(failure) => {
                send_reply(reply, Ok(Ending::Paused(None)));
                Err(failure)
            }
        }
    }

    /// Between two steps of a training: answers probes, and draws batches while samples owe the training no time.
    fn between_steps(&mut self, generator: &mut dyn ImageGenerator) -> Result<(), EngineFailure> {
        self.receive_all();
        self.answer_probes(generator)?;
        while !self.samples.is_empty() && self.account.may_draw() {
            self.draw(generator)?;
            self.receive_all();
        }
        Ok(())
    }

    /// Draws one batch of the sample with the earliest turn.
    fn draw(&mut self, generator: &mut dyn ImageGenerator) -> Result<(), EngineFailure> {
        let turns = self.samples.iter().enumerate();
        let Some((next, _)) = turns.min_by_key(|(_, sample)| sample.turn()) else { return Ok(()) };
        let PendingSample { mut command, mut drawn } = self.samples.remove(next);
        let n_images = command.spec.pictures().count();
        let n_batch = generator.batch().max(1);
        let images = drawn.len()..n_images.min(drawn.len() + n_batch);
        let (n_before, n_batches) = (drawn.len().div_ceil(n_batch), n_images.div_ceil(n_batch));
        command.left.store(n_images - images.end, Ordering::Release);

        let began = self.clock.now();
        self.account.batch_began(began);
        let input = DrawInput {
            spec: &command.spec,
            train: &command.train,
            weights: &command.weights,
            weights_sha256: &command.weights_sha256,
            job: command.train_job,
        };
        let outcome = catch_panic(|| {
            generator.draw(&input, images, &mut |step, total| {
                (command.on_step)(n_before as u64 * total + step, n_batches as u64 * total);
                if (command.is_wanted)() { Flow::Continue } else { Flow::Stop }
            })
        });
        let took = self.clock.now().saturating_sub(began);
        self.account.batch_ended(took);
        command.device_time.add(took);

        match outcome {
            Ok(Ok(Some(batch))) if !batch.is_empty() => {
                drawn.extend(batch);
                if drawn.len() < n_images {
                    self.samples.push(PendingSample { command, drawn });
                } else {
                    send_reply(command.reply, Ok(Some(drawn)));
                }
                Ok(())
            }
            Ok(Ok(Some(_))) => {
                send_reply(command.reply, Err(Fault::new(FaultCode::Internal, "the engine drew nothing")));
                Ok(())
            }
            outcome => forward(command.reply, outcome),
        }
    }

    /// Answers everything that waits for an engine while there is none. Probes are returned: they make another.
    pub(super) fn reject_all(&mut self) -> Vec<Reply<()>> {
        let fault = || Fault::device_lost("the device cannot be used");
        for (_, reply) in self.plans.drain(..) {
            send_reply(reply, Err(fault()));
        }
        for command in self.trainings.drain(..) {
            send_reply(command.reply, Err(fault()));
        }
        for sample in self.samples.drain(..) {
            send_reply(sample.command.reply, Err(fault()));
        }
        std::mem::take(&mut self.probes)
    }
}

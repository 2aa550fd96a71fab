//! Chooses the next action of a walk, by probability.

use std::sync::Arc;
use std::time::Duration;

use hypnos::store::Statement;

use super::client::{ClientRequest, Submission};
use super::conditions::Outage;
use super::database::Kind;
use super::walk::{Action, Checked, PLACES, Role, Up, Walk};
use super::world::{Late, LateCall, Process, What};

/// How long a writer of SQLite waits for another: the program's own patience.
pub(super) const BUSY: Duration = Duration::from_secs(5);

/// Jobs that are wanted once more, in a walk.
const N_RETRIES: usize = 2;

/// A thing that could happen, and its weight among all that could.
type Could = (u64, Action);

impl Walk<'_> {
    pub(super) fn choose(&mut self) -> Checked<Action> {
        let could =
            if self.conditions.is_faultless { self.could_without_faults(|_| true) } else { self.could() };
        self.pick(could)
    }

    /// The same, only at places that may go on.
    pub(super) fn choose_at(&mut self, may: impl Fn(usize) -> bool) -> Checked<Action> {
        let could = self.could_without_faults(may);
        self.pick(could)
    }

    fn pick(&mut self, mut could: Vec<Could>) -> Checked<Action> {
        let chosen = self.random.weighted(could.iter().map(|(weight, _)| *weight));
        chosen.map(|chosen| could.swap_remove(chosen).1).ok_or_else(|| "nothing can happen any more".into())
    }

    fn could(&mut self) -> Vec<Could> {
        let mut could = self.could_go_on(|_| true);
        self.time(&mut could);
        self.clients(&mut could);
        self.late_calls(&mut could);
        self.processes(&mut could);
        could.extend(match (self.outage, self.conditions.outage) {
            (None, None) => None,
            (None, Some(outage)) => Some((20, Action::Outage(outage))),
            (Some(_), _) => Some((40, Action::NoOutage)),
        });
        could
    }

    /// What brings things to an end.
    fn could_without_faults(&self, may: impl Fn(usize) -> bool) -> Vec<Could> {
        let mut could = self.could_go_on(&may);
        for (n, wanted) in self.clients.wanted.iter().enumerate() {
            let unknown = wanted.submission == Submission::Unknown && wanted.key.is_some();
            if unknown && !self.is_pending(&ClientRequest::Job(n)) && self.server_is_up() {
                could.push((1000, Action::Resend(n)));
            }
        }
        for (place, (role, _)) in PLACES.iter().enumerate() {
            if self.up[place].is_none() && *role != Role::Sweep && may(place) {
                could.push((1000, Action::Start(place)));
            }
        }
        if could.is_empty() {
            could.extend(self.next_moment().map(|moment| (1, Action::Tick(moment))));
        }
        could
    }

    /// Gates and devices where something could go on.
    fn could_go_on(&self, may: impl Fn(usize) -> bool) -> Vec<Could> {
        let mut could = Vec::new();
        let state = self.world.state();
        for gate in &state.gates {
            let up = |up: &Option<Up>| up.as_ref().is_some_and(|up| Arc::ptr_eq(&up.process, &gate.process));
            let place = self.up.iter().position(up);
            // On SQLite nobody begins to write while another writes, but gets the error that the file is busy after
            // some time.
            let is_free = self.database.kind == Kind::Postgres
                || gate.what != What::Statement(Statement::Begin)
                || state.open == 0
                || state.now >= gate.since + BUSY;
            if place.is_some_and(&may) && is_free && !gate.process.is_frozen() && !gate.hangs {
                could.push((1000, Action::Pass(gate.id)));
            }
        }
        drop(state);
        for (place, up) in self.up.iter().enumerate() {
            if let Some(up) = up
                && may(place)
                && !up.process.is_frozen()
                && up.device.as_ref().is_some_and(|device| device.pace.is_waiting())
            {
                could.push((1000, Action::Step(place)));
            }
        }
        could
    }

    fn time(&mut self, could: &mut Vec<Could>) {
        let weight = if could.is_empty() { 3000 } else { 300 };
        could.extend(self.next_moment().map(|moment| (weight, Action::Tick(moment))));
        let (soon, later) = (self.random.below(3000), self.random.below(40_000));
        could.push((300, Action::Wait(Duration::from_millis(soon))));
        could.push((self.conditions.waits, Action::Wait(Duration::from_millis(later))));
        could.push((self.conditions.waits / 4, Action::Wait(Duration::from_millis(60_000 + 3 * later))));
        if self.may_a_day_pass() {
            could.push((self.conditions.days, Action::NextDay));
        }
    }

    /// No upload and no late call may take a day.
    fn may_a_day_pass(&self) -> bool {
        let state = self.world.state();
        let is_server = |process: &Arc<Process>| process.name.starts_with("server");
        self.pending.is_empty()
            && state.late.is_empty()
            && state.open == 0
            && state.in_flight.is_empty()
            && !state.gates.iter().any(|gate| is_server(&gate.process))
            && !self.up.iter().flatten().any(|up| up.process.is_frozen())
    }

    fn clients(&self, could: &mut Vec<Could>) {
        for n in 0..self.pending.len() {
            could.push((20, Action::GiveUp(n)));
        }
        if !self.server_is_up() {
            return;
        }
        let conditions = &self.conditions;
        if self.clients.wanted.len() < conditions.n_wanted_max {
            could.push((300, Action::Want));
            could.extend(self.seen.succeeded().map(|id| (60, Action::Sample(id.to_owned()))));
        }
        if self.clients.wanted.len() < conditions.n_wanted_max + N_RETRIES {
            let known = self.seen.without_result().filter(|id| self.clients.known.contains_key(*id));
            could.extend(known.map(|id| (150, Action::Retry(id.to_owned()))));
        }
        for (n, wanted) in self.clients.wanted.iter().enumerate() {
            let weight = match (&wanted.submission, &wanted.key) {
                (Submission::Unknown, Some(_)) => 300,
                (Submission::Accepted(_), Some(_)) => 5,
                _ => 0,
            };
            if !self.is_pending(&ClientRequest::Job(n)) {
                could.push((weight, Action::Resend(n)));
            }
        }
        for (id, known) in &self.clients.known {
            let open = if self.seen.has_ended(id) { 1 } else { 4 };
            could.push((conditions.cancels * open, Action::Send(ClientRequest::Cancel(id.clone()))));
            could.push((conditions.deletes, Action::Send(ClientRequest::Delete(id.clone()))));
            could.push((2, Action::Send(ClientRequest::Read { id: id.clone(), was_deleted: known.deleted })));
        }
    }

    fn late_calls(&self, could: &mut Vec<Could>) {
        let state = self.world.state();
        let stalls =
            |late: &Late| self.outage == Some(Outage::Stall) && matches!(late.call, LateCall::Commit(_));
        for (n, late) in state.late.iter().enumerate() {
            if late.after > state.now || stalls(late) {
                continue;
            }
            // One whose process still waits for it is rarely the quicker.
            let weight = if late.process.is_dead() { 40 } else { 80 };
            could.push((weight, Action::Land(n)));
            could.push((10, Action::Lose(n)));
        }
    }

    fn processes(&self, could: &mut Vec<Could>) {
        let conditions = &self.conditions;
        for (place, (role, _)) in PLACES.iter().enumerate() {
            let Some(up) = &self.up[place] else {
                let weight = if *role == Role::Sweep { conditions.sweeps } else { 500 };
                could.push((weight, Action::Start(place)));
                continue;
            };
            could.push((conditions.kills, Action::Kill(place)));
            could.push(if up.process.is_frozen() {
                (60, Action::Thaw(place))
            } else {
                (conditions.freezes, Action::Freeze(place))
            });
            if *role == Role::Worker && !up.drain.is_cancelled() {
                could.push((conditions.drains, Action::Drain(place)));
            }
        }
    }

    fn is_pending(&self, request: &ClientRequest) -> bool {
        self.pending.iter().any(|pending| pending.request == *request)
    }

    fn server_is_up(&self) -> bool {
        self.servers().next().is_some()
    }

    /// Places of servers that take requests.
    pub(super) fn servers(&self) -> impl Iterator<Item = usize> {
        (0..PLACES.len()).filter(|place| {
            self.up[*place].as_ref().is_some_and(|up| up.router.get().is_some() && !up.process.is_frozen())
        })
    }
}

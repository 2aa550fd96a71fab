//! The probabilities of faults in a walk. Each walk has its own: some lose many answers, some kill, some freeze, some
//! do a little of everything.

use hypnos::store::{Delivery, Statement};

use super::random::Random;
use super::world::What;

/// What goes wrong for a while, at every call that it concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outage {
    /// No commit is answered, and none is done before it is over: a disk that does not sync, a standby that is awaited.
    Stall,
    /// The database does not answer.
    NoDatabase,
    /// The object store does not answer.
    NoStore,
    /// What is done is not answered, by the database or by the store.
    NoAnswers,
}

/// How often of a thousand calls each thing befalls one, and how much each thing weighs among all that could happen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Conditions {
    pub(super) is_faultless: bool,
    /// Whether database and object store know each other at the beginning.
    pub(super) is_paired: bool,
    pub(super) n_actions: u64,
    /// Of these, so many at the beginning go well.
    pub(super) n_warm: u64,
    pub(super) n_wanted_max: usize,
    pub(super) attempts_max: i64,
    not_sent: u64,
    answer_lost: u64,
    hang: u64,
    /// Of commits, of writes to the store.
    late: u64,
    /// Seconds before a late call is carried out, at most.
    lateness: u64,
    /// What goes wrong for a while, if anything does.
    pub(super) outage: Option<Outage>,
    pub(super) waits: u64,
    pub(super) days: u64,
    pub(super) cancels: u64,
    pub(super) deletes: u64,
    pub(super) kills: u64,
    pub(super) freezes: u64,
    pub(super) drains: u64,
    pub(super) sweeps: u64,
}

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Passage {
    Through(Delivery),
    /// It is never carried out and never answered.
    Hangs,
}

impl Outage {
    /// What becomes of a call meanwhile, if it is one that this concerns.
    pub(super) fn passage(self, what: &What, random: &mut Random) -> Option<Passage> {
        let is_statement = matches!(what, What::Statement(_));
        match self {
            Self::Stall => {
                (*what == What::Statement(Statement::Commit)).then_some(Passage::Through(Delivery::Late))
            }
            Self::NoDatabase | Self::NoStore if is_statement != (self == Self::NoDatabase) => None,
            Self::NoDatabase | Self::NoStore if random.per_mille(700) => {
                Some(Passage::Through(Delivery::NotSent))
            }
            Self::NoDatabase | Self::NoStore => Some(Passage::Hangs),
            Self::NoAnswers => Some(Passage::Through(Delivery::AnswerLost)),
        }
    }
}

impl Conditions {
    /// Nothing goes wrong, and nobody wants anything more.
    pub(super) const FAULTLESS: Self = Self {
        is_faultless: true,
        is_paired: true,
        n_actions: 0,
        n_warm: 0,
        n_wanted_max: 0,
        attempts_max: 3,
        not_sent: 0,
        answer_lost: 0,
        hang: 0,
        late: 0,
        lateness: 0,
        outage: None,
        waits: 0,
        days: 0,
        cancels: 0,
        deletes: 0,
        kills: 0,
        freezes: 0,
        drains: 0,
        sweeps: 0,
    };

    pub(super) fn new(random: &mut Random) -> Self {
        Self {
            is_faultless: false,
            is_paired: !random.per_mille(100),
            n_actions: 150 + random.below(350),
            n_warm: random.of(&[0, 20, 60, 120]),
            n_wanted_max: random.of(&[1, 1, 2, 3, 4]),
            attempts_max: random.of(&[1, 3, 3, 10]),
            not_sent: random.of(&[0, 0, 5, 20]),
            answer_lost: random.of(&[0, 5, 20, 60]),
            hang: random.of(&[0, 0, 5, 20]),
            late: random.of(&[0, 10, 30, 100]),
            lateness: random.of(&[20, 100, 300]),
            outage: random.of(&[
                None,
                None,
                Some(Outage::Stall),
                Some(Outage::Stall),
                Some(Outage::NoDatabase),
                Some(Outage::NoStore),
                Some(Outage::NoAnswers),
            ]),
            waits: random.of(&[10, 60, 150]),
            days: random.of(&[0, 0, 10]),
            cancels: random.of(&[0, 1, 5]),
            deletes: random.of(&[0, 2, 10]),
            kills: random.of(&[0, 0, 4, 15]),
            freezes: random.of(&[0, 0, 4, 15]),
            drains: random.of(&[0, 0, 10]),
            sweeps: random.of(&[0, 5, 20]),
        }
    }

    /// The same without anything that goes wrong.
    pub(super) fn warm(self) -> Self {
        let Self { n_wanted_max, attempts_max, waits, .. } = self;
        Self { is_faultless: false, n_wanted_max, attempts_max, waits, ..Self::FAULTLESS }
    }

    /// What becomes of a call.
    pub(super) fn passage(&self, what: &What, random: &mut Random) -> Passage {
        let late = if what.can_be_late() { self.late } else { 0 };
        let weights = [self.not_sent, self.answer_lost, self.hang, late];
        let rest = 1000_u64.saturating_sub(weights.iter().sum());
        match random.weighted(weights.into_iter().chain([rest])) {
            Some(0) => Passage::Through(Delivery::NotSent),
            Some(1) => Passage::Through(Delivery::AnswerLost),
            Some(2) => Passage::Hangs,
            Some(3) => Passage::Through(Delivery::Late),
            _ => Passage::Through(Delivery::Answered),
        }
    }

    /// How long a late call takes at least, in milliseconds.
    pub(super) fn lateness_ms(&self, random: &mut Random) -> u64 {
        random.below(self.lateness * 1000 + 1)
    }
}

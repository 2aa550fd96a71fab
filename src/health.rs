//! Health of this process's devices: reported by the workers, read by `/readyz`.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use jiff::Timestamp;

/// The devices of this process. Clones are one.
#[derive(Clone, Debug, Default)]
pub struct Health(Arc<Mutex<Vec<Device>>>);

/// A device and its condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its name in the settings, such as `cuda:0`. Two workers may share one.
    pub name: String,
    /// Its condition.
    pub condition: Condition,
}

/// Condition of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Its engine is being created.
    Starting,
    /// It takes jobs.
    Working,
    /// A job failed because of the machine: it takes no job until a probe succeeds.
    BackingOff {
        /// What failed, in one line.
        why: String,
        /// When.
        since: SystemTime,
        /// When it is probed next.
        next_probe: SystemTime,
    },
    /// This process cannot use it any more. When all devices are dead, the process ends.
    Dead {
        /// What failed, in one line.
        why: String,
        /// When.
        since: SystemTime,
    },
}

impl Health {
    /// All devices, in the order of the settings; none where this process has no workers.
    pub fn devices(&self) -> Vec<Device> {
        self.lock().clone()
    }

    /// Whether at least one device takes jobs, or there are no devices.
    pub fn is_ready(&self) -> bool {
        let devices = self.lock();
        devices.is_empty() || devices.iter().any(|device| device.condition == Condition::Working)
    }

    /// Adds a device that is starting, and returns the reporter of its condition.
    pub fn add(&self, name: &str) -> Reporter {
        let mut devices = self.lock();
        devices.push(Device { name: name.to_owned(), condition: Condition::Starting });
        let reporter = Reporter { health: self.clone(), index: devices.len() - 1, name: name.to_owned() };
        reporter.set_gauge(false);
        reporter
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Device>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reports the condition of one device.
#[derive(Clone, Debug)]
pub struct Reporter {
    health: Health,
    index: usize,
    name: String,
}

impl Reporter {
    /// It takes jobs.
    pub fn working(&self) {
        self.set(Condition::Working);
    }

    /// It takes no job for `pause`, and then it is probed. After a further fault, `since` is still the time of the
    /// first one.
    pub fn backing_off(&self, why: &str, pause: Duration) {
        let now = SystemTime::now();
        let since = match self.condition() {
            Condition::BackingOff { since, .. } => since,
            _ => now,
        };
        self.set(Condition::BackingOff { why: why.to_owned(), since, next_probe: now + pause });
    }

    /// This process cannot use it any more.
    pub fn dead(&self, why: &str) {
        self.set(Condition::Dead { why: why.to_owned(), since: SystemTime::now() });
    }

    fn condition(&self) -> Condition {
        self.health.lock()[self.index].condition.clone()
    }

    fn set(&self, condition: Condition) {
        self.set_gauge(condition == Condition::Working);
        self.health.lock()[self.index].condition = condition;
    }

    fn set_gauge(&self, works: bool) {
        let labels = [("worker", self.index.to_string()), ("device", self.name.clone())];
        metrics::gauge!("hypnos_device_working", &labels).set(f64::from(u8::from(works)));
    }
}

impl fmt::Display for Device {
    /// One line, such as
    /// `cuda:0: backing off since 2026-11-27T10:00:00Z, next probe at 2026-11-27T10:00:05Z: out of memory`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.name)?;
        match &self.condition {
            Condition::Starting => f.write_str("starting"),
            Condition::Working => f.write_str("working"),
            Condition::BackingOff { why, since, next_probe } => {
                write!(
                    f,
                    "backing off since {}, next probe at {}: {why}",
                    second(*since),
                    second(*next_probe)
                )
            }
            Condition::Dead { why, since } => write!(f, "dead since {}: {why}", second(*since)),
        }
    }
}

/// A time, truncated to the second.
fn second(time: SystemTime) -> Timestamp {
    let time = Timestamp::try_from(time).unwrap_or(Timestamp::UNIX_EPOCH);
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_ready_while_one_of_its_devices_works() {
        let health = Health::default();
        assert!(health.is_ready(), "no workers: nothing that could fail");
        let (first, second) = (health.add("cuda:0"), health.add("cuda:1"));
        assert!(!health.is_ready(), "both are starting");
        first.working();
        second.working();
        first.backing_off("out of memory", Duration::from_secs(5));
        assert!(health.is_ready(), "the other one works");
        second.dead("an illegal address was used");
        assert!(!health.is_ready());
        first.working();
        assert!(health.is_ready());
        let lines: Vec<String> = health.devices().iter().map(ToString::to_string).collect();
        assert_eq!(lines[0], "cuda:0: working");
        assert!(
            lines[1].starts_with("cuda:1: dead since 2") && lines[1].ends_with("illegal address was used")
        );
    }

    #[test]
    fn a_device_that_fails_again_has_been_backing_off_since_its_first_fault() {
        let health = Health::default();
        let device = health.add("cpu");
        device.backing_off("no scratch directory", Duration::from_secs(5));
        let Condition::BackingOff { since: first, .. } = health.devices()[0].condition.clone() else {
            panic!()
        };
        device.backing_off("no scratch directory", Duration::from_secs(10));
        let Condition::BackingOff { since, next_probe, .. } = health.devices()[0].condition.clone() else {
            panic!()
        };
        assert_eq!(since, first);
        assert!(next_probe >= since + Duration::from_secs(10));
    }
}

//! PyTorch's side: a child process that obeys one line at a time and answers each with one line of JSON.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use hypnos::ml::{Error, Result};
use serde_json::Value;

use super::cases::Case;

/// What the child runs; it is part of this program, so that a measurement needs no checkout.
pub(super) const PROGRAM: &str = include_str!("torch_eager.py");

/// The running child. It waits at its input, and so is quiet, whenever it was not asked for something.
pub(super) struct Torch {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    /// Threads and versions, as the child says them.
    pub about: Value,
}

impl Torch {
    /// Starts `python` with PyTorch on `n_threads` threads, for work on `device` in `dtype`. [`Error::Input`] if it
    /// cannot be started or lacks torch.
    pub(super) fn start(python: &str, n_threads: usize, device: &str, dtype: &str) -> Result<Self> {
        let mut child = Command::new(python)
            .args(["-c", PROGRAM, &n_threads.to_string(), device, dtype])
            .env("HF_HUB_OFFLINE", "1") // configurations only: nothing is to be fetched
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| Error::input(format!("--python {python}: {error}")))?;
        let (Some(to), Some(from)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Error::input(format!("--python {python}: no pipes to it")));
        };
        let mut torch = Self { child, to, from: BufReader::new(from), about: Value::Null };
        torch.about = torch.answer("start")?;
        match torch.about["threads"].as_u64() {
            Some(n) if n == n_threads as u64 => Ok(torch),
            n => Err(Error::input(format!("torch: wanted {n_threads} threads, got {n:?}"))),
        }
    }

    /// The child's process id.
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Builds a case, dropping the one before.
    pub(super) fn set_up(&mut self, case: &Case) -> Result<()> {
        let spec = serde_json::to_string(case).map_err(|error| Error::input(error.to_string()))?;
        self.ask(&format!("setup {spec}")).map(|_| ())
    }

    /// Seconds of one run, the mean of `n`, measured inside.
    pub(super) fn measure(&mut self, n: usize) -> Result<f64> {
        let answer = self.ask(&format!("run {n}"))?;
        answer["seconds"].as_f64().ok_or_else(|| Error::input(format!("torch: run answered {answer}")))
    }

    /// Forgets the case and gives its memory back.
    pub(super) fn drop_case(&mut self) -> Result<()> {
        self.ask("drop").map(|_| ())
    }

    fn ask(&mut self, line: &str) -> Result<Value> {
        let word = line.split(' ').next().unwrap_or(line);
        let sent = writeln!(self.to, "{line}").and_then(|()| self.to.flush());
        sent.map_err(|error| Error::input(format!("torch: cannot send {word}: {error}")))?;
        self.answer(word)
    }

    fn answer(&mut self, word: &str) -> Result<Value> {
        let mut line = String::new();
        let read = self.from.read_line(&mut line);
        if !read.is_ok_and(|n| n > 0) {
            let end = self.child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
            return Err(Error::input(format!("torch: it ended at {word} ({end})")));
        }
        let answer: Value = serde_json::from_str(&line)
            .map_err(|_| Error::input(format!("torch: {word} was answered with {:?}", line.trim_end())))?;
        match answer.get("error") {
            Some(error) => {
                Err(Error::input(format!("torch: {word}: {}", error.as_str().unwrap_or("failed"))))
            }
            None => Ok(answer),
        }
    }
}

impl Drop for Torch {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it has nothing to save, and may have ended already
        let _ = self.child.wait();
    }
}

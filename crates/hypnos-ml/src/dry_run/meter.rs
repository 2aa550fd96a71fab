//! Counts of a dry run: bytes in use, their peak, arithmetic.

use std::cell::RefCell;
use std::rc::Rc;

/// The counts of one dry run. Clones are one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Meter(Rc<RefCell<Counts>>);

#[derive(Debug, Default)]
struct Counts {
    live: u64,
    peak: u64,
    /// Of products, of convolutions.
    flops: [f64; 2],
    on_gpu: bool,
}

/// Memory in use as long as it lives.
#[derive(Debug)]
pub(super) struct Block {
    bytes: u64,
    meter: Meter,
}

impl Drop for Block {
    fn drop(&mut self) {
        self.meter.0.borrow_mut().live -= self.bytes;
    }
}

impl Meter {
    /// Nothing is in use. Operations work with other scratch memory on a GPU.
    pub(crate) fn new(on_gpu: bool) -> Self {
        Self(Rc::new(RefCell::new(Counts { on_gpu, ..Counts::default() })))
    }

    pub(crate) fn on_gpu(&self) -> bool {
        self.0.borrow().on_gpu
    }

    /// Most bytes that were in use at once.
    pub(crate) fn peak(&self) -> u64 {
        self.0.borrow().peak
    }

    /// Floating point operations so far: of products, of convolutions.
    pub(crate) fn flops(&self) -> [f64; 2] {
        self.0.borrow().flops
    }

    pub(super) fn alloc(&self, bytes: u64) -> Rc<Block> {
        self.keep(bytes);
        Rc::new(Block { bytes, meter: self.clone() })
    }

    /// Memory that outlives the run, such as the gradients of weights.
    pub(super) fn keep(&self, bytes: u64) {
        let mut counts = self.0.borrow_mut();
        counts.live += bytes;
        counts.peak = counts.peak.max(counts.live);
    }

    pub(super) fn compute(&self, flops: f64, is_convolution: bool) {
        self.0.borrow_mut().flops[usize::from(is_convolution)] += flops;
    }
}

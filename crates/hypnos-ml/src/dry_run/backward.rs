//! The backward of a dry run: candle's, on shapes.

use std::collections::HashMap;
use std::rc::Rc;

use candle_core::Result;

use super::meter::{Block, Meter};
use super::tensor::{Cost, DryTensor, Inner, Rule, fresh};

/// Gradients by the tensor that they belong to.
type Store = HashMap<*const Inner, Rc<Block>>;

/// Goes back from `root`, a scalar or any other. The gradients of weights stay in use; everything else that is made is
/// freed at the end.
pub(crate) fn backward(root: &DryTensor) -> Result<()> {
    gradients(root).map(drop)
}

/// As `candle_core::Tensor::backward`: gives the gradients of the variables, and of what else nobody asked for.
fn gradients(root: &DryTensor) -> Result<Store> {
    let meter = root.meter();
    let mut store = Store::from([(root.id(), meter.alloc(root.bytes()))]);
    for tensor in sorted(root) {
        let Some(node) = tensor.node() else { continue };
        let Some(_gradient) = store.remove(&tensor.id()) else { continue };
        match &node.rule {
            Rule::Candle { temporaries } => {
                for input in &node.inputs {
                    let _temporaries = meter.alloc(temporaries * input.bytes());
                    add(&mut store, input, meter);
                }
            }
            Rule::Custom(cost) => custom(&mut store, &node.inputs, cost, meter),
            Rule::Checkpoint(block) => recomputed(&mut store, &node.inputs, block, meter)?,
        }
    }
    Ok(store)
}

/// candle adds each gradient to what is there, and to zeros where there is nothing yet.
fn add(store: &mut Store, input: &DryTensor, meter: &Meter) {
    let before = store.remove(&input.id()).unwrap_or_else(|| meter.alloc(input.bytes()));
    store.insert(input.id(), meter.alloc(input.bytes()));
    drop(before);
}

fn custom(store: &mut Store, inputs: &[DryTensor], cost: &Cost, meter: &Meter) {
    let tracked = || inputs.iter().filter(|input| input.is_tracked());
    let made: Vec<Rc<Block>> = tracked().map(|input| meter.alloc(input.bytes())).collect();
    meter.keep(cost.gradients);
    drop(meter.alloc(cost.backward_scratch));
    if !made.is_empty() {
        meter.compute(cost.input_flops, cost.is_convolution);
    }
    if cost.gradients > 0 {
        meter.compute(cost.weight_flops, cost.is_convolution);
    }
    tracked().for_each(|input| add(store, input, meter));
}

/// The block once more, with a graph of its own, and back through it.
fn recomputed(
    store: &mut Store,
    inputs: &[DryTensor],
    block: &dyn Fn(&[DryTensor]) -> Result<DryTensor>,
    meter: &Meter,
) -> Result<()> {
    let made: Vec<Rc<Block>> = {
        let inside = fresh(inputs);
        let y = block(&inside)?;
        // The value times its gradient, summed: what candle can go back from.
        let sum = y.times(&y.detach()).mean_all();
        drop(y);
        let mut found = gradients(&sum)?;
        let tracked = inside.iter().filter(|input| input.is_variable());
        tracked.map(|input| found.remove(&input.id()).unwrap_or_else(|| meter.alloc(input.bytes()))).collect()
    };
    inputs.iter().filter(|input| input.is_tracked()).for_each(|input| add(store, input, meter));
    drop(made);
    Ok(())
}

/// The tracked tensors that `root` came from, each before those that it came from: the order of candle's `sorted_nodes`.
fn sorted(root: &DryTensor) -> Vec<DryTensor> {
    fn walk(tensor: &DryTensor, seen: &mut HashMap<*const Inner, bool>, found: &mut Vec<DryTensor>) {
        if seen.insert(tensor.id(), true).is_some() {
            return;
        }
        for input in tensor.node().iter().flat_map(|node| &node.inputs) {
            walk(input, seen, found);
        }
        if tensor.is_tracked() {
            found.push(tensor.clone());
        }
    }
    let mut found = Vec::new();
    walk(root, &mut HashMap::new(), &mut found);
    found.reverse();
    found
}

//! The stack machine of a pickle, as far as `torch.save` uses it. It builds values and calls nothing.
//!
//! Values are nodes in a list and refer to one another by number, so a value that is used a thousand times is there
//! once, and what is allocated is bounded by the pickle's length: texts stay where they are in it.

use std::collections::{BTreeMap, HashMap};

use safetensors::Dtype;

/// Most values of a pickle. Those of Stable Diffusion have 30,000.
const NODES_MAX: usize = 1 << 18;

/// Most tensors of a dictionary. Those of Stable Diffusion have 1,130.
const TENSORS_MAX: usize = 1 << 16;

/// Longest part of a name from a pickle in a message.
const SHOWN_MAX: usize = 100;

type Id = u32;

/// What a pickle built.
#[derive(Debug)]
pub(super) struct Heap<'a> {
    nodes: Vec<Node<'a>>,
    root: Id,
    n_read: usize,
}

/// A tensor as its pickle describes it; nothing is checked yet. Sizes and strides are in numbers, not bytes.
#[derive(Clone, Debug)]
pub(super) struct Tensor<'a> {
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
    pub(super) offset: usize,
    pub(super) storage: Storage<'a>,
}

/// Numbers of one type, of which tensors are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Storage<'a> {
    pub(super) key: &'a str,
    pub(super) dtype: Dtype,
    pub(super) n: usize,
}

#[derive(Clone, Debug)]
enum Node<'a> {
    None,
    Bool(bool),
    Int(i64),
    /// A whole number of more than eight bytes, little-endian.
    Long(&'a [u8]),
    Float,
    Text(&'a str),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Known(Known),
    Storage(Storage<'a>),
    Tensor(Tensor<'a>),
}

/// The names that a dictionary of tensors needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    /// `collections.OrderedDict`.
    OrderedDict,
    /// `torch._utils._rebuild_tensor`: storage, offset, shape, strides.
    Tensor,
    /// `torch._utils._rebuild_tensor_v2`: the same, then whether it has a gradient, and hooks.
    TensorV2,
    /// `torch._utils._rebuild_parameter`: a tensor, whether it has a gradient, and hooks.
    Parameter,
    /// A type of storage.
    Storage(Dtype),
    /// What published checkpoints name beside their tensors: nothing is made of it.
    Inert,
}

/// Classes and functions that published checkpoints name beside their tensors, in what their trainers noted.
const INERT: [(&str, &str); 7] = [
    ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    ("torch", "Size"),
    ("__builtin__", "set"),
];

impl std::fmt::Display for Known {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::OrderedDict => "collections.OrderedDict",
            Self::Tensor => "torch._utils._rebuild_tensor",
            Self::TensorV2 => "torch._utils._rebuild_tensor_v2",
            Self::Parameter => "torch._utils._rebuild_parameter",
            Self::Storage(_) => "a type of storage, which takes none",
            Self::Inert => "what is not read",
        })
    }
}

impl Known {
    fn of(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor") => Self::Tensor,
            ("torch._utils", "_rebuild_tensor_v2") => Self::TensorV2,
            ("torch._utils", "_rebuild_parameter") => Self::Parameter,
            ("torch", name) => Self::Storage(match name.strip_suffix("Storage")? {
                "Float" => Dtype::F32,
                "Double" => Dtype::F64,
                "Half" => Dtype::F16,
                "BFloat16" => Dtype::BF16,
                "Long" => Dtype::I64,
                "Int" => Dtype::I32,
                "Short" => Dtype::I16,
                "Char" => Dtype::I8,
                "Byte" => Dtype::U8,
                "Bool" => Dtype::BOOL,
                _ => return None,
            }),
            name if INERT.contains(&name) => Self::Inert,
            _ => return None,
        })
    }
}

impl<'a> Heap<'a> {
    /// How many bytes the pickle has; others may follow.
    pub(super) fn n_read(&self) -> usize {
        self.n_read
    }

    /// The tensors of a dictionary by their names, in its order.
    pub(super) fn tensors(&self) -> Result<Vec<(&'a str, Tensor<'a>)>, String> {
        let Node::Dict(entries) = self.node(self.root) else {
            return Err("holds no dictionary; a dictionary of tensors is wanted".into());
        };
        // Trainers save more than weights, which then have a dictionary of their own.
        let own = entries.iter().find(|(key, _)| self.text(*key) == Some("state_dict"));
        let entries = match own.map(|(_, value)| self.node(*value)) {
            Some(Node::Dict(own)) => own,
            _ => entries,
        };
        let tensor = |(key, value): &(Id, Id)| match (self.node(*key), self.node(*value)) {
            (Node::Text(name), Node::Tensor(tensor)) => Some((*name, tensor.clone())),
            _ => None,
        };
        let tensors: Vec<_> = entries.iter().filter_map(tensor).take(TENSORS_MAX + 1).collect();
        if tensors.len() > TENSORS_MAX {
            return Err(format!("has more than {TENSORS_MAX} tensors"));
        }
        if !tensors.is_empty() {
            return Ok(tensors);
        }
        let names = entries.iter().filter_map(|(key, _)| self.text(*key)).take(5).map(shown);
        let names = names.collect::<Vec<_>>().join(", ");
        Err(format!("holds no tensors at the top of its dictionary, whose entries begin with [{names}]"))
    }

    /// Every storage that the pickle names, by its key, whether a tensor that is wanted lies in it or not. What is wrong
    /// if two of one key differ: only one of them can be checked against the file.
    pub(super) fn storages(&self) -> Result<HashMap<&'a str, Storage<'a>>, String> {
        let mut storages = HashMap::new();
        for node in &self.nodes {
            let Node::Storage(storage) = node else { continue };
            let first = storages.entry(storage.key).or_insert_with(|| storage.clone());
            if first != storage {
                let both = [&*first, storage].map(|one| format!("{} numbers of {:?}", one.n, one.dtype));
                return Err(format!(
                    "has the storage `{}` twice: {}",
                    shown(storage.key),
                    both.join(" and ")
                ));
            }
        }
        Ok(storages)
    }

    /// The whole numbers of a dictionary by their names.
    pub(super) fn ints(&self) -> BTreeMap<String, i64> {
        let Node::Dict(entries) = self.node(self.root) else { return BTreeMap::new() };
        let number = |(key, value): &(Id, Id)| Some((self.text(*key)?.to_owned(), int(self.node(*value))?));
        entries.iter().filter_map(number).collect()
    }

    /// The texts of a list.
    pub(super) fn texts(&self) -> Result<Vec<&'a str>, String> {
        let Node::List(items) = self.node(self.root) else {
            return Err("has no list of storages where one was wanted".into());
        };
        let texts = items.iter().map(|id| self.text(*id)).collect::<Option<_>>();
        texts.ok_or_else(|| "has a list of storages with something in it that is no text".into())
    }

    /// A whole number.
    pub(super) fn int(&self) -> Option<i64> {
        int(self.node(self.root))
    }

    /// The bytes of a large whole number, little-endian.
    pub(super) fn number(&self) -> Option<Vec<u8>> {
        if let Node::Long(bytes) = self.node(self.root) { Some(bytes.to_vec()) } else { None }
    }

    /// What a dictionary says under this key, if that is true or false.
    pub(super) fn flag(&self, key: &str) -> Option<bool> {
        let Node::Dict(entries) = self.node(self.root) else { return None };
        let (_, value) = entries.iter().find(|(name, _)| self.text(*name) == Some(key))?;
        if let Node::Bool(flag) = self.node(*value) { Some(*flag) } else { None }
    }

    fn node(&self, id: Id) -> &Node<'a> {
        &self.nodes[id as usize]
    }

    fn text(&self, id: Id) -> Option<&'a str> {
        if let Node::Text(text) = self.node(id) { Some(text) } else { None }
    }
}

fn int(node: &Node<'_>) -> Option<i64> {
    if let Node::Int(n) = node { Some(*n) } else { None }
}

/// Text of a pickle in a message: on one line, and not too long.
pub(super) fn shown(text: &str) -> String {
    text.chars().take(SHOWN_MAX).collect::<String>().escape_debug().to_string()
}

/// Runs the pickle at the beginning of `bytes` to its end.
pub(super) fn run(bytes: &[u8]) -> Result<Heap<'_>, String> {
    let mut machine = Machine {
        code: bytes,
        at: 0,
        heap: Heap { nodes: Vec::new(), root: 0, n_read: 0 },
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
    };
    while machine.step().map_err(|what| format!("{what} (at byte {} of its pickle)", machine.at))? {}
    let Machine { mut heap, mut stack, at, .. } = machine;
    heap.root = stack.pop().ok_or("has a pickle that builds nothing")?;
    heap.n_read = at;
    Ok(heap)
}

struct Machine<'a> {
    code: &'a [u8],
    at: usize,
    heap: Heap<'a>,
    stack: Vec<Id>,
    /// How high the stack was at each mark.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    /// Does one instruction; false at the last. Their letters are those of `pickletools.py`.
    fn step(&mut self) -> Result<bool, String> {
        match self.byte()? {
            b'.' => return Ok(false),
            0x80 => self.protocol()?,
            b'N' => self.push(Node::None)?,
            0x88 => self.push(Node::Bool(true))?,
            0x89 => self.push(Node::Bool(false))?,
            b'K' | b'M' | b'J' | 0x8a => self.number()?,
            b'G' => {
                self.take(8)?;
                self.push(Node::Float)?;
            }
            b'X' | b'T' => self.text(4)?,
            b'U' | 0x8c => self.text(1)?,
            b'c' => self.name()?,
            b'(' => self.marks.push(self.stack.len()),
            b')' => self.push(Node::Tuple(Vec::new()))?,
            b']' => self.push(Node::List(Vec::new()))?,
            b'}' => self.push(Node::Dict(Vec::new()))?,
            b't' => self.tuple_values_above_mark()?,
            0x85 => self.tuple(1)?,
            0x86 => self.tuple(2)?,
            0x87 => self.tuple(3)?,
            b'a' | b'e' | b's' | b'u' => self.fill()?,
            b'q' | b'r' | b'h' | b'j' => self.remember()?,
            b'Q' => self.storage()?,
            b'R' => self.apply()?,
            b'b' => self.state()?,
            other => {
                self.at -= 1;
                return Err(format!("has the instruction {other:#04x}, which tensors do not need"));
            }
        }
        Ok(true)
    }

    fn protocol(&mut self) -> Result<(), String> {
        match self.byte()? {
            0..=2 => Ok(()),
            other => Err(format!("is of protocol {other} of pickles; 2 is wanted, which torch.save writes")),
        }
    }

    fn number(&mut self) -> Result<(), String> {
        let n = match self.code[self.at - 1] {
            b'K' => i64::from(self.byte()?),
            b'M' => i64::from(u16::from_le_bytes(self.array()?)),
            b'J' => i64::from(i32::from_le_bytes(self.array()?)),
            _ => {
                let n_bytes = usize::from(self.byte()?);
                let bytes = self.take(n_bytes)?;
                if n_bytes > 8 {
                    return self.push(Node::Long(bytes));
                }
                let negative = bytes.last().is_some_and(|last| last & 0x80 != 0);
                let mut wide = [if negative { 0xff } else { 0 }; 8];
                wide[..n_bytes].copy_from_slice(bytes);
                i64::from_le_bytes(wide)
            }
        };
        self.push(Node::Int(n))
    }

    /// A text with its length before it, in 1 or 4 bytes. Those of Python 2 are bytes, which are ASCII in names.
    fn text(&mut self, width: usize) -> Result<(), String> {
        let length = self.take(width)?.iter().rev().fold(0, |n, byte| n << 8 | usize::from(*byte));
        let bytes = self.take(length)?;
        let text = std::str::from_utf8(bytes).map_err(|_| "has a text that is not UTF-8")?;
        self.push(Node::Text(text))
    }

    /// A function or a class by its name. This is the instruction that lets a pickle run code elsewhere.
    fn name(&mut self) -> Result<(), String> {
        let (module, name) = (self.line()?, self.line()?);
        let known = Known::of(module, name).ok_or_else(|| {
            let name = format!("{}.{}", shown(module), shown(name));
            format!("holds code: it names `{name}`, which tensors do not need; nothing of it was run")
        })?;
        self.push(Node::Known(known))
    }

    fn tuple_values_above_mark(&mut self) -> Result<(), String> {
        let items = self.values_above_mark()?;
        self.push(Node::Tuple(items))
    }

    fn tuple(&mut self, n: usize) -> Result<(), String> {
        let from = self.stack.len().checked_sub(n).ok_or("takes from an empty stack")?;
        let items = self.stack.split_off(from);
        self.push(Node::Tuple(items))
    }

    /// Puts one value, or all behind the mark, into the list or the dictionary before them.
    fn fill(&mut self) -> Result<(), String> {
        let items = match self.code[self.at - 1] {
            b'a' => vec![self.pop()?],
            b's' => {
                let value = self.pop()?;
                vec![self.pop()?, value]
            }
            _ => self.values_above_mark()?,
        };
        let into_list = matches!(self.code[self.at - 1], b'a' | b'e');
        let into = self.top()? as usize;
        match &mut self.heap.nodes[into] {
            Node::List(list) if into_list => list.extend(items),
            Node::Dict(dict) if !into_list && items.len() % 2 == 0 => {
                dict.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
            }
            _ => return Err("adds values to something that is no list or dictionary".into()),
        }
        Ok(())
    }

    /// Keeps the last value under a number, or brings back what was kept.
    fn remember(&mut self) -> Result<(), String> {
        let code = self.code[self.at - 1];
        let key = match code {
            b'q' | b'h' => u32::from(self.byte()?),
            _ => u32::from_le_bytes(self.array()?),
        };
        if matches!(code, b'q' | b'r') {
            let last = self.top()?;
            self.memo.insert(key, last);
        } else {
            let kept = self.memo.get(&key).ok_or("uses a value that it did not keep")?;
            self.stack.push(*kept);
        }
        Ok(())
    }

    /// What lies outside the pickle: `("storage", type, key, device, how many numbers)`. The stream adds which part of
    /// another storage it is, where that is so.
    fn storage(&mut self) -> Result<(), String> {
        let id = self.pop()?;
        let bad = "refers to something outside that is no storage";
        let Node::Tuple(items) = self.heap.node(id) else { return Err(bad.into()) };
        let (&[kind, dtype, key, _, n], rest) = items.split_first_chunk().ok_or(bad)?;
        let (Some("storage"), Node::Known(Known::Storage(dtype)), Some(key)) =
            (self.heap.text(kind), self.heap.node(dtype), self.heap.text(key))
        else {
            return Err(bad.into());
        };
        if rest.iter().any(|id| !matches!(self.heap.node(*id), Node::None)) {
            return Err("has a storage that is part of another, as PyTorch before 0.4 saved them".into());
        }
        let (dtype, n) =
            (*dtype, self.size(n).ok_or("has a storage whose size is no whole number from 0 on")?);
        self.push(Node::Storage(Storage { key, dtype, n }))
    }

    /// The state of an object, which for a dictionary of tensors are notes on versions. They are left out.
    fn state(&mut self) -> Result<(), String> {
        self.pop()?;
        self.top().map(|_| ())
    }

    /// What the known names do.
    fn apply(&mut self) -> Result<(), String> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let Node::Known(known) = *self.heap.node(function) else {
            return Err("calls something that is no function".into());
        };
        let Node::Tuple(arguments) = self.heap.node(arguments) else {
            return Err("calls a function without a tuple of arguments".into());
        };
        let arguments: Vec<Id> = arguments.iter().take(8).copied().collect(); // none of them has more
        let bad = || format!("has wrong arguments for {known}");
        let made = match (known, arguments.as_slice()) {
            (Known::Inert, _) => Node::Known(Known::Inert),
            (Known::OrderedDict, []) => Node::Dict(Vec::new()),
            (Known::OrderedDict, [pairs]) => Node::Dict(self.pairs(*pairs).ok_or_else(bad)?),
            (Known::Tensor, [storage, offset, shape, strides])
            | (Known::TensorV2, [storage, offset, shape, strides, ..]) => {
                let tensor = self.tensor(*storage, *offset, *shape, *strides);
                Node::Tensor(tensor.ok_or_else(bad)?)
            }
            (Known::Parameter, [tensor, ..]) => match self.heap.node(*tensor) {
                tensor @ Node::Tensor(_) => tensor.clone(),
                _ => return Err(bad()),
            },
            _ => return Err(bad()),
        };
        self.push(made)
    }

    /// The pairs in a list, as Python 2 gives them to an ordered dictionary. The list has none left: used again and
    /// again, it would grow without bound.
    fn pairs(&mut self, id: Id) -> Option<Vec<(Id, Id)>> {
        let Node::List(pairs) = &mut self.heap.nodes[id as usize] else { return None };
        let pairs = std::mem::take(pairs);
        let pair = |id: &Id| match self.heap.node(*id) {
            Node::List(pair) | Node::Tuple(pair) => Some((*pair.first()?, *pair.get(1)?)),
            _ => None,
        };
        pairs.iter().map(pair).collect()
    }

    fn tensor(&self, storage: Id, offset: Id, shape: Id, strides: Id) -> Option<Tensor<'a>> {
        let Node::Storage(storage) = self.heap.node(storage) else { return None };
        let (shape, strides) = (self.sizes(shape)?, self.sizes(strides)?);
        Some(Tensor { shape, strides, offset: self.size(offset)?, storage: storage.clone() })
    }

    fn sizes(&self, id: Id) -> Option<Vec<usize>> {
        let Node::Tuple(sizes) = self.heap.node(id) else { return None };
        if sizes.len() > 8 {
            return None; // a convolution's kernel has 5 axes at most; a value used often may be large
        }
        sizes.iter().map(|id| self.size(*id)).collect()
    }

    fn size(&self, id: Id) -> Option<usize> {
        int(self.heap.node(id))?.try_into().ok()
    }

    fn push(&mut self, node: Node<'a>) -> Result<(), String> {
        if self.heap.nodes.len() >= NODES_MAX {
            return Err(format!("has more than {NODES_MAX} values"));
        }
        self.stack.push(self.heap.nodes.len() as Id);
        self.heap.nodes.push(node);
        Ok(())
    }

    fn pop(&mut self) -> Result<Id, String> {
        self.stack.pop().ok_or_else(|| "takes from an empty stack".into())
    }

    fn top(&self) -> Result<Id, String> {
        self.stack.last().copied().ok_or_else(|| "takes from an empty stack".into())
    }

    /// All values behind the last mark.
    fn values_above_mark(&mut self) -> Result<Vec<Id>, String> {
        let mark = self
            .marks
            .pop()
            .filter(|mark| *mark <= self.stack.len())
            .ok_or("goes back to a mark that it did not set")?;
        Ok(self.stack.split_off(mark))
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.array::<1>()?[0])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let rest = self.code.get(self.at..).and_then(|rest| rest.first_chunk());
        let bytes = *rest.ok_or("has a pickle that is cut off")?;
        self.at += N;
        Ok(bytes)
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(n);
        let bytes = end.and_then(|end| self.code.get(self.at..end)).ok_or("has a pickle that is cut off")?;
        self.at += n;
        Ok(bytes)
    }

    /// A text up to the end of its line.
    fn line(&mut self) -> Result<&'a str, String> {
        let rest = &self.code[self.at..];
        let end = rest.iter().position(|byte| *byte == b'\n').ok_or("has a pickle that is cut off")?;
        let text = std::str::from_utf8(&rest[..end]).map_err(|_| "has a name that is not UTF-8")?;
        self.at += end + 1;
        Ok(text)
    }
}

//! A real GRU context as an [`Executor`].

use agent::{ExecuteError, GruContext};
use protos::gru::cb::Instruction;

use super::executor::{Broken, Executor, Outcome};

/// Control blocks of a worker's context: it takes them in turn.
pub const CONTROL_BLOCKS: u32 = 2;

/// The context of one worker.
#[derive(Debug)]
pub struct Context {
    context: GruContext,
    next: u32,
    bytes: Vec<u8>,
}

impl Context {
    /// Wraps a context.
    pub fn new(context: GruContext) -> Self {
        Self {
            context,
            next: 0,
            bytes: Vec::new(),
        }
    }
}

fn broken(error: impl std::fmt::Display) -> Broken {
    Broken(error.to_string())
}

impl Executor for Context {
    fn ds_bytes(&self) -> usize {
        self.context.ds_bytes() as usize
    }
    fn write_ds(&mut self, offset: u32, words: &[u64]) -> Result<(), Broken> {
        self.bytes.clear();
        self.bytes.extend(words.iter().flat_map(|w| w.to_le_bytes()));
        self.context.ds_write(offset, &self.bytes).map_err(broken)
    }
    fn read_ds(&mut self, offset: u32, words: &mut [u64]) -> Result<(), Broken> {
        self.bytes.resize(words.len() * 8, 0);
        self.context.ds_read(offset, &mut self.bytes).map_err(broken)?;
        for (word, bytes) in words.iter_mut().zip(self.bytes.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        Ok(())
    }
    fn execute(&mut self, instruction: &Instruction) -> Result<Outcome, Broken> {
        let cb = self.next;
        self.next = (self.next + 1) % self.context.cbs().clamp(1, CONTROL_BLOCKS);
        match self.context.execute(cb, instruction) {
            Ok(completion) => Ok(Outcome::Completed {
                avalue: completion.avalue,
                tag: completion.tag,
            }),
            Err(ExecuteError::Exception(exception)) => Ok(Outcome::Exception {
                ecause: exception.ecause,
            }),
            Err(ExecuteError::Agent(error)) => Err(broken(error)),
        }
    }
}

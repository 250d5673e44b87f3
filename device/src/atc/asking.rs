//! What an engine holds while it asks the client: see [`super::asked`].

use super::engine::{Engine, Guard};
use super::types::{Access, Miss, SpaceId};

/// What an access has found.
#[derive(Debug)]
pub enum Translation<'e> {
    /// Memory, here.
    Guard(Guard<'e>),
    /// Memory that has to be asked for.
    Asking(Asking<'e>),
}

impl Engine {
    /// As [`Engine::access`], for callers that can ask the client where there is no file.
    ///
    /// # Errors
    /// [`Miss`], but not [`Miss::ByMessage`].
    #[inline]
    pub fn translate(
        &mut self,
        space: SpaceId,
        va: u64,
        len: u64,
        access: Access,
    ) -> Result<Translation<'_>, Miss> {
        let write = access == Access::Write;
        loop {
            let after = self.events();
            let (found, shift) = self.atc.core.access(self.slot, space.0, va, write)?;
            if found.host != 0 {
                return Ok(Translation::Guard(self.guard(
                    space,
                    (va, len),
                    access,
                    (found, shift),
                    after,
                )));
            }
            self.atc.core.leave(self.slot);
            let by = self.by;
            let asked = self.atc.core.ask(self.slot, space.0, (va, len), access, by)?;
            // Else it has become memory of the other kind meanwhile.
            if let Some((found, len)) = asked {
                return Ok(Translation::Asking(Asking {
                    engine: self,
                    iova: found.iova,
                    len,
                    tag: found.tag,
                }));
            }
        }
    }
}

/// A translation in use for a request to the client. Holds up no purge, except between [`Asking::commit`] and its
/// end.
#[derive(Debug)]
pub struct Asking<'e> {
    engine: &'e mut Engine,
    iova: u64,
    len: u64,
    tag: u64,
}

impl Asking<'_> {
    /// Where the client has it.
    #[must_use]
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// Bytes that it covers; may be fewer than asked for.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Never.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Generation that software gave to the translation.
    #[must_use]
    pub fn tag(&self) -> u64 {
        self.tag
    }

    /// The translation was taken away: what was read is not to be used.
    #[must_use]
    pub fn is_purged(&self) -> bool {
        self.engine.atc.core.asked(self.engine.slot, |asked| asked.purged)
    }

    /// A request to write is about to be sent; a purge waits for `self` from now on. False: it has been purged.
    #[must_use]
    pub fn commit(&self) -> bool {
        self.engine.atc.core.commit(self.engine.slot)
    }
}

impl Asking<'_> {
    /// Give it back. Whether a purge has met it, which may wait for this.
    #[must_use]
    pub fn end(self) -> bool {
        self.leave()
    }

    fn leave(&self) -> bool {
        let atc = &self.engine.atc;
        if atc.core.sanitized {
            atc.hear();
        }
        atc.core.give_back(self.engine.slot).unwrap_or(false)
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        // (After `end` there is nothing left to give back.)
        self.leave();
    }
}

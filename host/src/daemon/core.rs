//! What all connections share: the device, the sessions, the numbers.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use driver::backing::Backing;
use driver::gru::Gru;
use protos::bridge::control::{MAX_PACKET, UffdMode};
use serde_json::{Map, Value, json};

use super::config::ReclaimConfig;
use crate::fence::Fence;
use crate::session::identity::Identity;
use crate::session::memory::DeviceMemory;
use crate::session::{Refusal, Session};
use crate::stats;
use crate::uffd::Injection;

/// Room that a packet leaves for the statistics, escaped.
const STATS_BUDGET: usize = MAX_PACKET - 4096;

/// How the daemon behaves, as sessions need to know it.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// See `HostConfig`.
    pub uffd_mode: UffdMode,
    /// See `HostConfig`; zero = never.
    pub fence_timeout: Duration,
    /// See `HostConfig`.
    pub reclaim: Option<ReclaimConfig>,
    /// See `HostConfig`.
    pub large_pages: bool,
    /// See `HostConfig::break_held_pages`.
    pub keep_held_pages: bool,
    /// See `HostConfig::break_safety_net` and `HostConfig::safety_net_delay`.
    pub injection: Injection,
}

/// The daemon's shared state.
#[derive(Debug)]
pub struct Core {
    /// How it behaves.
    pub options: Options,
    /// The device.
    pub backing: Arc<dyn Backing>,
    /// Its driver.
    pub gru: Arc<Gru>,
    /// What it may reach.
    pub memory: DeviceMemory,
    /// How peers are fenced.
    pub fence: Arc<Fence>,
    /// This process, for agents.
    pub own_pidfd: OwnedFd,
    uid: u32,
    started: Instant,
    /// A leaf: held to look a session up, never while one works.
    sessions: Mutex<BTreeMap<u32, Arc<Session>>>,
    session_numbers: AtomicU32,
    context_numbers: AtomicU32,
    sessions_closed: AtomicU64,
}

impl Core {
    /// Over an open device.
    #[must_use]
    pub fn new(options: Options, gru: Arc<Gru>, fence: Arc<Fence>, own_pidfd: OwnedFd) -> Arc<Self> {
        let backing = gru.backing().clone();
        let memory = DeviceMemory::new(backing.clone(), options.keep_held_pages);
        let named = gru.wants_changes().and_then(|wants| match wants {
            true => gru.name_changes(memory.log_changes()?),
            false => Ok(()),
        });
        if let Err(error) = named {
            tracing::error!(%error, "the device's sanitizer (level 2) cannot be told of changes");
        }
        Arc::new(Self {
            options,
            memory,
            backing,
            gru,
            fence,
            own_pidfd,
            uid: rustix::process::geteuid().as_raw(),
            started: Instant::now(),
            sessions: Mutex::default(),
            session_numbers: AtomicU32::new(1),
            context_numbers: AtomicU32::new(1),
            sessions_closed: AtomicU64::new(0),
        })
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<u32, Arc<Session>>> {
        self.sessions.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Whether a process may use this daemon at all: the daemon's own user, or root.
    #[must_use]
    pub fn accepts(&self, identity: &Identity) -> bool {
        identity.may_act_for(self.uid)
    }

    /// What agents are told to wait for this daemon before they fence *it*, in milliseconds; 0 = for ever. The
    /// daemon may itself be waiting: for a device, then for whoever is talking to the same peer, then for its
    /// other peers, each with the fence's timeout, and each may take a moment to be gone. (Requests before this
    /// one do not count: agents see those being served.)
    #[must_use]
    pub fn patience_of_agents_ms(&self) -> u64 {
        let timeout = self.options.fence_timeout;
        if timeout.is_zero() {
            return 0;
        }
        u64::try_from((timeout * 4 + Duration::from_secs(1)).as_millis()).unwrap_or(u64::MAX)
    }

    /// A number for a new session.
    pub fn next_session(&self) -> u32 {
        self.session_numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// A number for a new context.
    pub fn next_context(&self) -> u32 {
        self.context_numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// Lets a session be found.
    pub fn admit(&self, session: &Arc<Session>) {
        self.table().insert(session.id, session.clone());
    }

    /// Takes a session out, before it closes.
    pub fn dismiss(&self, session: &Arc<Session>) {
        if self.table().remove(&session.id).is_some() {
            self.sessions_closed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The sessions that are open.
    #[must_use]
    pub fn sessions(&self) -> Vec<Arc<Session>> {
        self.table().values().cloned().collect()
    }

    /// The newest session of a process, for somebody else who may act on it.
    ///
    /// # Errors
    /// ESRCH, EPERM.
    pub fn session_of(&self, pid: u32, who: &Identity) -> Result<Arc<Session>, Refusal> {
        let session = self
            .table()
            .values()
            .rev()
            .find(|s| s.space.pid() == pid)
            .cloned();
        let session = session.ok_or_else(|| {
            Refusal::new(
                libc::ESRCH,
                format!("process {pid} has no session here; let it attach first"),
            )
        })?;
        if !who.may_act_for(session.uid) {
            return Err(Refusal::new(
                libc::EPERM,
                format!(
                    "process {pid} belongs to user {}, not to user {}",
                    session.uid, who.uid
                ),
            ));
        }
        Ok(session)
    }

    /// The statistics, see [`crate::stats`]. `own` = the asking connection's session.
    #[must_use]
    pub fn statistics(&self, own: Option<&Arc<Session>>) -> Value {
        let (mapped_files, mapped_ranges) = self.memory.count();
        let driver: Map<String, Value> = self
            .gru
            .stats()
            .entries()
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.into()))
            .collect();
        let mut all = json!({
            "daemon": {
                "pid": std::process::id(),
                "uptime_ms": u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
                "sessions_opened": self.session_numbers.load(Ordering::Relaxed) - 1,
                "sessions_closed": self.sessions_closed.load(Ordering::Relaxed),
                "fence_timeout_ms": u64::try_from(self.options.fence_timeout.as_millis()).unwrap_or(u64::MAX),
                "uffd_mode": self.options.uffd_mode,
            },
            "device": {
                "pid": self.backing.pid(),
                "alive": self.backing.alive(),
                "mapped_files": mapped_files,
                "mapped_ranges": mapped_ranges,
                "held_pages": self.memory.held().map(|held| json!({
                    "now": held.pages(),
                    "mapped": held.stats.held.load(Ordering::Relaxed),
                    "dropped": held.stats.dropped.load(Ordering::Relaxed),
                    "unannounced": held.stats.unannounced.load(Ordering::Relaxed),
                    "evictions": held.stats.evictions.load(Ordering::Relaxed),
                })),
                "flush_is_nonsleeping": self.gru.flush_is_nonsleeping(),
                "resources_in_use": self.gru.resources_in_use(),
                "driver": driver,
            },
            "fence": self.fence.stats(),
        });
        let mut sessions = self.sessions();
        sessions.sort_by_key(|s| own.is_none_or(|own| own.id != s.id));
        let mut room = STATS_BUDGET.saturating_sub(escaped_length(&all));
        let mut listed = Vec::new();
        for session in &sessions {
            let figures = stats::of_session(session);
            let Some(left) = room.checked_sub(escaped_length(&figures) + 1) else {
                break;
            };
            room = left;
            listed.push(figures);
        }
        all["sessions_left_out"] = (sessions.len() - listed.len()).into();
        all["sessions"] = listed.into();
        all
    }
}

/// Bytes of a value as a string inside a packet.
fn escaped_length(value: &Value) -> usize {
    Value::String(value.to_string()).to_string().len()
}

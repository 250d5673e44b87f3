//! Whether KVM runs guests on this machine, and how long a boot takes. Found out by booting, once for each
//! start of this machine: /dev/kvm may be there, make a machine, and yet never get a guest anywhere.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::Lab;
use crate::guest::{Accelerator, Failure, Guest, Spec};
use crate::initramfs::Initramfs;
use crate::kernel::Series;
use crate::place::{say, write_whole};

/// A stock kernel boots in 2 s where KVM works.
const KVM_LIMIT: Duration = Duration::from_secs(15);

/// What was found out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acceleration {
    /// What guests should use.
    pub accelerator: Accelerator,
    /// Why not KVM.
    pub why: Option<String>,
    /// How long a boot takes with it.
    pub boot: Duration,
}

/// As it is kept.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    boot_id: String,
    kvm: bool,
    why: Option<String>,
    boot_ms: u64,
}

impl Lab {
    /// What was found out since this machine started, or is found out now with the stock kernel, which must
    /// be there. `TLBRIDGE_ACCEL=kvm` or `tcg` decides instead.
    ///
    /// # Errors
    /// Not even emulation boots a guest.
    pub fn acceleration(&self) -> Result<Acceleration> {
        let wanted = match std::env::var("TLBRIDGE_ACCEL").as_deref() {
            Ok("kvm") => Some(Accelerator::Kvm),
            Ok("tcg") => Some(Accelerator::Tcg),
            Ok("") | Err(_) => None,
            Ok(other) => bail!("TLBRIDGE_ACCEL={other}: it is kvm or tcg"),
        };
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        if let Some(found) = self.kept(boot_id.trim(), wanted) {
            return Ok(found);
        }
        let _held = match self.lock() {
            Ok(held) => held,
            // Somebody else's lab: it is found out, but not kept.
            Err(_) if self.directory().is_dir() => {
                let log = tempfile::NamedTempFile::new().context("a log for the probe")?;
                return self.probe(wanted, log.path());
            }
            Err(error) => return Err(error),
        };
        if let Some(found) = self.kept(boot_id.trim(), wanted) {
            return Ok(found);
        }
        let found = self.probe(wanted, &self.path("probe.log"))?;
        let kept = Kept {
            boot_id: boot_id.trim().to_owned(),
            kvm: found.accelerator == Accelerator::Kvm,
            why: found.why.clone(),
            boot_ms: found.boot.as_millis().try_into().unwrap_or(u64::MAX),
        };
        write_whole(
            &self.path("acceleration.json"),
            &serde_json::to_vec(&kept).context("what was found out")?,
        )?;
        Ok(found)
    }

    fn kept(&self, boot_id: &str, wanted: Option<Accelerator>) -> Option<Acceleration> {
        let text = std::fs::read(self.path("acceleration.json")).ok()?;
        let kept: Kept = serde_json::from_slice(&text).ok()?;
        let accelerator = match kept.kvm {
            true => Accelerator::Kvm,
            false => Accelerator::Tcg,
        };
        let fits = kept.boot_id == boot_id && wanted.is_none_or(|w| w == accelerator);
        fits.then(|| Acceleration {
            accelerator,
            why: kept.why,
            boot: Duration::from_millis(kept.boot_ms),
        })
    }

    fn probe(&self, wanted: Option<Accelerator>, log: &Path) -> Result<Acceleration> {
        let boot = |accelerator, limit| -> Result<Result<Duration, Failure>> {
            let mut spec = Spec::new(
                self.find_qemu()?,
                self.find_kernel(Series::Stable)?.image,
                Initramfs::new(self)?.to_bytes()?,
                log.to_owned(),
            );
            spec.accelerator = accelerator;
            spec.boot_limit = Some(limit);
            Ok(Guest::start(&spec, None).map(|guest| guest.booted_in()))
        };
        let mut why = Some("TLBRIDGE_ACCEL=tcg".to_owned());
        if wanted != Some(Accelerator::Tcg) {
            match rustix::fs::access(
                Path::new("/dev/kvm"),
                rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK,
            ) {
                Err(error) => why = Some(format!("/dev/kvm: {error}")),
                Ok(()) => {
                    say(&format!(
                        "does KVM run a guest here? At most {} s",
                        KVM_LIMIT.as_secs()
                    ));
                    match boot(Accelerator::Kvm, KVM_LIMIT)? {
                        Ok(took) => {
                            return Ok(Acceleration {
                                accelerator: Accelerator::Kvm,
                                why: None,
                                boot: took,
                            });
                        }
                        Err(failure) => why = Some(reason(&failure)),
                    }
                }
            }
            if wanted == Some(Accelerator::Kvm) {
                bail!("TLBRIDGE_ACCEL=kvm, but {}", why.unwrap_or_default());
            }
        }
        if let Some(why) = &why {
            say(&format!("guests are emulated (TCG): {why}"));
        }
        let took = boot(Accelerator::Tcg, Duration::from_secs(180))?
            .context("a stock kernel does not boot, not even emulated")?;
        say(&format!("a boot takes {:.1} s", took.as_secs_f64()));
        Ok(Acceleration {
            accelerator: Accelerator::Tcg,
            why,
            boot: took,
        })
    }
}

/// In one line.
fn reason(failure: &Failure) -> String {
    match failure {
        Failure::Hang { limit, .. } => {
            format!("a stock kernel does not come up under KVM within {limit:.0?}")
        }
        Failure::NotStarted { said } => {
            let last = said.lines().last().unwrap_or_default();
            format!(
                "QEMU does not start with KVM: {}",
                last.trim_start_matches([' ', '|'])
            )
        }
        Failure::Panic { line, .. } => format!("under KVM a stock kernel ends with \"{line}\""),
        other => {
            let text = other.to_string();
            format!("under KVM {}", text.lines().next().unwrap_or_default())
        }
    }
}

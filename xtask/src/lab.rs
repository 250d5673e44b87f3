//! `cargo xtask lab`: everything that tests with QEMU and with guests take, made if it is not there.

use lab::Lab;
use lab::guest::Accelerator;
use lab::kernel::Series;
use std::time::Instant;

/// What cannot be had: what would use it, and why.
pub type Missing = Vec<String>;

/// Finds or makes the parts of the lab, the backports' kernel and the root image if `whole`, and says what there is.
/// What the machine or the network lacks is not an error but in the list that is returned.
///
/// # Errors
/// No place for a lab.
pub fn provide(whole: bool) -> anyhow::Result<Missing> {
    let begin = Instant::now();
    let lab = Lab::locate()?;
    println!("lab: {}", lab.directory().display());
    let mut missing = Missing::new();
    match lab.provide_qemu() {
        Ok(qemu) => println!(
            "lab: {}: {}",
            qemu.display(),
            lab::qemu::version(&qemu).unwrap_or_default()
        ),
        Err(error) => {
            missing.push(format!("tests with QEMU and guests: {error:#}"));
            return Ok(missing);
        }
    }
    match lab.provide_kernel(Series::Stable) {
        Ok(kernel) => println!("lab: {}", kernel.modules.unwrap_or_default().display()),
        Err(error) => {
            missing.push(format!("tests with guests: {error:#}"));
            return Ok(missing);
        }
    }
    match lab.acceleration() {
        Ok(found) => println!(
            "lab: guests run {}, a boot takes {:.1} s",
            match (found.accelerator, found.why) {
                (Accelerator::Kvm, _) => "on KVM".to_owned(),
                (Accelerator::Tcg, why) => format!("emulated ({})", why.unwrap_or_default()),
            },
            found.boot.as_secs_f64()
        ),
        Err(error) => {
            missing.push(format!("tests with guests: {error:#}"));
            return Ok(missing);
        }
    }
    match lab.provide_gru_modules(Series::Stable) {
        Ok(modules) => {
            for module in modules {
                println!("lab: {}", module.display());
            }
        }
        Err(error) => missing.push(format!("tests of the sgi-gru driver in a guest: {error:#}")),
    }
    if let Err(error) = lab.provide_rdma() {
        missing.push(format!("tests with RDMA programs in guests: {error:#}"));
    }
    if whole {
        match lab.provide_kernel(Series::Backports) {
            Ok(kernel) => println!("lab: {}", kernel.modules.unwrap_or_default().display()),
            Err(error) => missing.push(format!("tests with the backports' kernel: {error:#}")),
        }
        match lab.provide_image() {
            Ok(image) => println!("lab: {}", image.display()),
            Err(error) => missing.push(format!("tests with rdma-core's own tests in a guest: {error:#}")),
        }
    }
    println!("lab: {:.1} s", begin.elapsed().as_secs_f64());
    Ok(missing)
}

/// The same as a command.
///
/// # Errors
/// As [`provide`].
pub fn run(whole: bool) -> anyhow::Result<bool> {
    let missing = provide(whole)?;
    for what in &missing {
        println!("lab: unavailable: {what}");
    }
    Ok(missing.is_empty())
}

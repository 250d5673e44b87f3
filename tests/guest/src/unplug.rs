//! The device is removed while contexts are open.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use protos::gru::cb::{Instruction, XType};

use crate::Outcome;
use crate::driver::{Gru, Shape};
use crate::memory::{PAGE, Region};

const FUNCTION: &str = "/sys/bus/pci/drivers/tlbridge_uv";
/// In the environment of the process that is to lose its device.
const VICTIM: &str = "GRU_GUEST_VICTIM";

pub fn run(gru: &Gru) -> Outcome {
    if std::env::var_os(VICTIM).is_some() {
        return victim(gru);
    }
    let function = fs::read_dir(FUNCTION)
        .with_context(|| FUNCTION)?
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().starts_with("0000:"))
        .context("no function is bound")?;
    // Two programs in the middle of work: one in the interrupt's way, and a kernel context.
    ensure!(
        gru.ktest(0).context("the driver's test")? == 0,
        "the driver's test fails"
    );
    let mut children = Vec::new();
    for _ in 0..2 {
        children.push(
            Command::new(std::env::current_exe().context("this program")?)
                .arg("unplug")
                .env(VICTIM, "1")
                .stdout(Stdio::piped())
                .spawn()
                .context("starting a program that uses the device")?,
        );
    }
    for child in &mut children {
        // It says one word when it works.
        let mut word = [0; 8];
        let out = child.stdout.as_mut().expect("piped");
        std::io::Read::read_exact(out, &mut word).context("the program says nothing")?;
    }
    fs::write(function.path().join("remove"), "1").context("removing the function")?;
    for mut child in children {
        let status = child.wait().context("the program")?;
        ensure!(
            status.signal() == Some(libc::SIGBUS),
            "a program that has lost its device ended with {status}, not by SIGBUS"
        );
    }
    // What the driver itself does ends, too.
    for test in 0..4 {
        ensure!(gru.ktest(test) != Ok(0), "test {test} passes without a device");
    }
    gru.ktest(99).context("unloading the kernel's contexts")?;
    Ok("two programs got SIGBUS, the driver's tests end in errors".into())
}

fn victim(gru: &Gru) -> Outcome {
    let gseg = gru.context(Shape::default())?;
    let region = Region::anonymous(64 * PAGE)?;
    region.fill(0, 64 * PAGE, 3);
    for round in 0u64.. {
        let page = (round % 64) as usize;
        gseg.flush(region.va(page * PAGE), PAGE)?;
        let load = Instruction::vload(region.va(page * PAGE), 0, XType::DWORD, 8, 1);
        gseg.run(0, &load)?.done().or_else(lost)?;
        if round == 20 {
            println!("working");
            std::io::Write::flush(&mut std::io::stdout()).context("stdout")?;
        }
    }
    unreachable!("rounds do not end")
}

/// An instruction that is aborted by the removal is all right: the next touch is not.
fn lost(error: anyhow::Error) -> Result<u64> {
    if error.to_string().contains("exception") {
        Ok(0)
    } else {
        Err(error)
    }
}

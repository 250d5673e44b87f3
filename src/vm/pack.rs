//! What a guest starts with.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use lab::Lab;
use lab::initramfs::Initramfs;
use lab::kernel::Kernel;

use super::kind;
use crate::cli::{GuestKind, VmArgs, VmModel};

/// What the guest starts with, and its command.
pub(super) fn pack(args: &VmArgs, lab: &Lab, kernel: &Kernel) -> Result<(Initramfs, Option<String>)> {
    let mut files = Initramfs::new(lab)?;
    if let Some(initrd) = &args.initrd {
        let archive = std::fs::read(initrd).with_context(|| format!("reading {}", initrd.display()))?;
        files.add_archive_before(&archive);
    }
    let wanted: Vec<&str> = args.load.iter().map(String::as_str).collect();
    for module in kernel.with_dependencies(&wanted)? {
        files.add_module(lab, &module)?;
    }
    match kind(args) {
        GuestKind::Small => {}
        GuestKind::Rdma => {
            lab.provide_rdma()?;
            files.add_rdma(lab, kernel)?;
        }
        GuestKind::Debian => {
            files.enter_image(lab, kernel)?;
            files.add_rdma_modules(lab, kernel)?;
        }
    }
    if args.model == Some(VmModel::Gru) {
        if args.kernel.is_none() {
            for module in lab.provide_gru_modules(super::series(args))? {
                files.add_module(lab, &module)?;
            }
        } else if args.module.is_empty() {
            eprintln!(
                "tlbridge: no driver for the GRU in this guest: driver/kmod/gru/build.sh makes tlbridge_uv.ko and \
                 gru.ko for a kernel, --module loads them"
            );
        }
    }
    for module in &args.module {
        files.add_module(lab, module)?;
    }
    for program in &args.program {
        files.add_program(program)?;
    }
    for file in &args.file {
        let name = file_name(file)?;
        files.add_copy(&format!("root/{name}"), file)?;
    }
    let mut words = args.command.clone();
    if let Some(first) = words.first_mut()
        && first.contains('/')
        && !files.contains(first)
        && Path::new(first.as_str()).is_file()
    {
        let program = PathBuf::from(first.as_str());
        files.add_program(&program)?;
        *first = file_name(&program)?.to_owned();
    }
    let command: Vec<String> = words.iter().map(|w| quoted(w)).collect();
    Ok((files, (!command.is_empty()).then(|| command.join(" "))))
}

fn file_name(path: &Path) -> Result<&str> {
    path.file_name()
        .and_then(|n| n.to_str())
        .with_context(|| format!("{} has no name that the guest could use", path.display()))
}

/// As one word of the shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_word_when_quoted_is_one_word_of_the_shell() {
        for word in ["", "a b", "it's", "$(reboot)", "\"", "\\", "*"] {
            let output = std::process::Command::new("sh")
                .args(["-c", &format!("printf %s {}", quoted(word))])
                .output()
                .unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout), word);
        }
    }
}

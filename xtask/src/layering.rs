//! The direction of the dependencies: protos <- device, protos <- driver <- host, the root on top; device
//! and driver never see each other, only tests and the root see both.

use anyhow::{Context, bail};
use serde_json::Value;
use std::process::Command;

/// Which workspace crates each workspace crate may depend on, in any kind of dependency.
const ALLOWED: &[(&str, &[&str])] = &[
    ("tlbridge-protos", &[]),
    ("tlbridge-device", &["tlbridge-protos"]),
    ("tlbridge-driver", &["tlbridge-protos"]),
    ("tlbridge-agent", &["tlbridge-protos", "tlbridge-driver"]),
    (
        "tlbridge-preload",
        &["tlbridge-protos", "tlbridge-driver", "tlbridge-agent"],
    ),
    ("tlbridge-host", &["tlbridge-protos", "tlbridge-driver"]),
    ("tlbridge-lab", &[]),
    ("tlbridge-verbs", &[]),
    (
        "tlbridge-tests",
        &[
            "tlbridge-lab",
            "tlbridge-protos",
            "tlbridge-device",
            "tlbridge-driver",
            "tlbridge-agent",
            "tlbridge-host",
        ],
    ),
    (
        "tlbridge",
        &[
            "tlbridge-lab",
            "tlbridge-verbs",
            "tlbridge-protos",
            "tlbridge-device",
            "tlbridge-driver",
            "tlbridge-agent",
            "tlbridge-host",
        ],
    ),
    ("tlbridge-guest-tests", &["tlbridge-protos"]),
    ("xtask", &["tlbridge-lab"]),
];

/// Fails with every edge that points the wrong way.
pub fn check() -> anyhow::Result<()> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps"])
        .output()
        .context("cargo metadata")?;
    if !output.status.success() {
        bail!(
            "cargo metadata failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata's JSON")?;
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata names no packages")?;
    let names: Vec<&str> = packages.iter().filter_map(|p| p["name"].as_str()).collect();
    let mut wrong = Vec::new();
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        let Some((_, allowed)) = ALLOWED.iter().find(|(n, _)| *n == name) else {
            wrong.push(format!(
                "{name}: not in the table of xtask/src/layering.rs; say what it may depend on"
            ));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let to = dependency["name"].as_str().unwrap_or_default();
            if names.contains(&to) && !allowed.contains(&to) {
                wrong.push(format!(
                    "{name} -> {to}: against the direction in ARCHITECTURE.md"
                ));
            }
        }
    }
    if wrong.is_empty() {
        println!(
            "layering: {} crates, every dependency points the right way",
            packages.len()
        );
        Ok(())
    } else {
        bail!("layering:\n  {}", wrong.join("\n  "))
    }
}

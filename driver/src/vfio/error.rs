//! Why a device cannot be had, and what to do about it.

use std::io;
use std::path::PathBuf;

/// Why a device of `/dev/vfio` cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Not `DDDD:BB:DD.F`.
    #[error("{0:?} is not a PCI address; `lspci -D` lists them, such as 0000:00:05.0")]
    Address(String),
    /// Nothing is there.
    #[error("there is no PCI device {0}; `lspci -D` lists them")]
    NoDevice(String),
    /// No IOMMU keeps the device's accesses apart.
    #[error(
        "{0} has no IOMMU group: enable the IOMMU (firmware, intel_iommu=on on the kernel's command line; in QEMU \
         -device intel-iommu,caching-mode=on)"
    )]
    NoGroup(String),
    /// Another driver has it.
    #[error(
        "{address} is not bound to vfio-pci but to {}: as root, modprobe vfio-pci; echo vfio-pci \
         >/sys/bus/pci/devices/{address}/driver_override; {}echo {address} >/sys/bus/pci/drivers_probe",
        driver.as_deref().unwrap_or("no driver"),
        driver.as_ref().map(|_| format!("echo {address} >/sys/bus/pci/devices/{address}/driver/unbind; "))
            .unwrap_or_default()
    )]
    NotBound {
        /// The device.
        address: String,
        /// Who has it.
        driver: Option<String>,
    },
    /// Another device of its group is with a driver of the kernel.
    #[error(
        "the IOMMU group {group} of {address} is not usable: bind every other device in \
         /sys/kernel/iommu_groups/{group}/devices to vfio-pci, too, or to no driver"
    )]
    NotViable {
        /// The device.
        address: String,
        /// Its group.
        group: String,
    },
    /// Not permitted.
    #[error("{}: permission denied; run as root, or give this user read and write permission on it", .0.display())]
    Permission(PathBuf),
    /// Somebody has it open.
    #[error("{}: somebody has it open; end that program (`fuser {}` names it)", .0.display(), .0.display())]
    Busy(PathBuf),
    /// The kernel's VFIO is not there, or not complete.
    #[error("{what}: load the modules vfio-pci and vfio_iommu_type1 (Linux with CONFIG_VFIO_GROUP)")]
    NoVfio {
        /// What is missing.
        what: String,
    },
    /// Some step failed.
    #[error("{address}: {what}: {source}")]
    Step {
        /// The device.
        address: String,
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The IOMMU could not be set, which has a usual reason.
    #[error(
        "{address}: the IOMMU cannot be used: {source}; if the kernel's log says that there is no interrupt \
         remapping, enable it (in QEMU: -device intel-iommu,intremap=on)"
    )]
    Iommu {
        /// The device.
        address: String,
        /// Why.
        source: io::Error,
    },
}

//! PCI: config space, BARs, MSI-X; to be written.

/// Interrupt vectors towards the client.
#[derive(Debug)]
pub struct Interrupts;

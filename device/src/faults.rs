//! What to break, when: injected faults, seeded and reproducible.

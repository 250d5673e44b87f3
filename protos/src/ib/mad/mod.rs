//! Management datagrams (section 13.4).

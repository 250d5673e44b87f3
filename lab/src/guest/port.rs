//! The guest's second serial port: commands go in, their output and the mark of their end come out.

/// What separates a report from output, before its mark.
const REPORT: u8 = 0o36;

/// Finds the report with a certain mark in a stream of output.
#[derive(Debug)]
pub(super) struct Unframer {
    mark: Vec<u8>,
    held: Vec<u8>,
}

/// What a piece of the stream contained.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Piece {
    /// Output, in order.
    pub output: Vec<u8>,
    /// The rest of the report's line, after which nothing belongs to this command.
    pub report: Option<String>,
}

impl Unframer {
    pub(super) fn new(mark: &str) -> Self {
        let mut start = vec![REPORT];
        start.extend_from_slice(mark.as_bytes());
        start.push(b' ');
        Self {
            mark: start,
            held: Vec::new(),
        }
    }

    /// Takes what was read. What could be the beginning of the report is held back.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Piece {
        self.held.extend_from_slice(bytes);
        let mut piece = Piece::default();
        let mut from = 0;
        while let Some(at) = self.held[from..].iter().position(|b| *b == REPORT) {
            let at = from + at;
            let rest = &self.held[at..];
            let common = rest.len().min(self.mark.len());
            if rest[..common] != self.mark[..common] {
                from = at + 1;
                continue;
            }
            if let Some(end) = rest.iter().position(|b| *b == b'\n')
                && rest.len() > common
            {
                piece.report = Some(String::from_utf8_lossy(&rest[common..end]).trim().to_owned());
                piece.output = self.held[..at].to_vec();
                self.held.clear();
                return piece;
            }
            piece.output = self.held.drain(..at).collect();
            return piece;
        }
        piece.output = std::mem::take(&mut self.held);
        piece
    }
}

/// A command as one line for the guest's init.
pub(super) fn line(mark: &str, kind: &str, command: &str) -> String {
    let mut line = format!("{mark} {kind} ");
    for byte in command.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b',' | b'_' | b'-' | b'=' | b':' => {
                line.push(char::from(byte));
            }
            _ => line.push_str(&format!("\\0{byte:03o}")),
        }
    }
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(stream: &[u8], mark: &str, chunk: usize) -> Piece {
        let mut unframer = Unframer::new(mark);
        let mut all = Piece::default();
        for bytes in stream.chunks(chunk) {
            let piece = unframer.push(bytes);
            all.output.extend(piece.output);
            all.report = all.report.or(piece.report);
        }
        all
    }

    #[test]
    fn test_report_when_split_anywhere_is_found_and_kept_out_of_the_output() {
        let stream = b"some\x1eoutput\x1em7 no\x1em8\x1e\x1em8 42\n";
        for chunk in 1..=stream.len() {
            let piece = all(stream, "m8", chunk);
            assert_eq!(
                piece.output, b"some\x1eoutput\x1em7 no\x1em8\x1e",
                "chunks of {chunk}"
            );
            assert_eq!(piece.report.as_deref(), Some("42"), "chunks of {chunk}");
        }
    }

    #[test]
    fn test_output_when_without_report_comes_at_once() {
        let mut unframer = Unframer::new("m1");
        assert_eq!(unframer.push(b"abc").output, b"abc");
        assert_eq!(unframer.push(b"d\x1em").output, b"d");
        assert_eq!(unframer.push(b"e").output, b"\x1eme");
    }

    #[test]
    fn test_line_when_the_command_has_anything_in_it_is_one_line_of_words() {
        assert_eq!(
            line("m", "run", "a 'b'\n\\%"),
            "m run a\\0040\\0047b\\0047\\0012\\0134\\0045\n"
        );
        let every: String = (1u8..=127).map(char::from).collect();
        let line = line("m", "run", &every);
        assert_eq!(line.matches('\n').count(), 1);
        assert_eq!(line.split(' ').count(), 3);
    }
}

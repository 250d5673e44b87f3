//! An unmodified C program under LD_PRELOAD, a device process and a host daemon: this test computes through
//! a GRU context on the *program's* address space while the program changes it.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use agent::{Agent, AttachOptions, ContextOptions, ExecuteError, FaultMode, GruContext};
use protos::gru::cb::{ExplicitOp, Instruction, XType};
use tests::processes;

/// Bytes of the program's block.
const LENGTH: u64 = 1 << 20;

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(arguments: &[&str], socket: &Path) -> Process {
    let mut child = Process(
        Command::new(processes::binary())
            .args(arguments)
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("tlbridge {}: {e}", arguments[0])),
    );
    let deadline = Instant::now() + Duration::from_secs(30);
    while !socket.exists() {
        assert!(
            child.0.try_wait().expect("waitpid").is_none() && Instant::now() < deadline,
            "tlbridge {} did not come up",
            arguments[0]
        );
        // The socket's appearance is the readiness; nothing else is synchronised by this wait.
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

fn agent_library() -> PathBuf {
    std::env::var_os("TLBRIDGE_AGENT_LIB").map_or_else(
        || processes::binary().with_file_name("libtlbridge_agent.so"),
        PathBuf::from,
    )
}

/// The program and its standard streams.
struct Program {
    child: Process,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Program {
    fn start(path: &Path, socket: &Path, heap: bool) -> Self {
        let mut command = Command::new(path);
        command
            .env("LD_PRELOAD", agent_library())
            .env("TLBRIDGE_SOCKET", socket)
            .env("TLBRIDGE_REQUIRED", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        if heap {
            command.env("TLBRIDGE_HEAP", "1");
        }
        let mut child = Process(command.spawn().expect("the program starts"));
        let (input, output) = (
            child.0.stdin.take().expect("piped"),
            child.0.stdout.take().expect("piped"),
        );
        Self {
            child,
            input,
            output: BufReader::new(output),
        }
    }

    /// Tells the program to do something; its answer.
    fn tell(&mut self, command: &str) -> String {
        writeln!(self.input, "{command}").expect("the program reads");
        let mut line = String::new();
        self.output.read_line(&mut line).expect("the program answers");
        assert!(
            !line.is_empty(),
            "the program ended at {command}: {:?}",
            self.child.0.try_wait()
        );
        line.trim().to_owned()
    }

    fn address(&mut self, command: &str) -> u64 {
        let line = self.tell(command);
        u64::from_str_radix(line.trim_start_matches("0x"), 16).unwrap_or_else(|e| panic!("{line}: {e}"))
    }
}

fn options() -> ContextOptions {
    ContextOptions {
        cbs: 2,
        ds_bytes: 1024,
        fault_mode: FaultMode::Interrupt,
    }
}

/// Loads 64 words spread over the block; the first one that is not as `seed` says.
fn check(context: &GruContext, block: u64, seed: u64) -> Result<(), ExecuteError> {
    for piece in 0..16u64 {
        let offset = piece * (LENGTH / 16);
        context.execute(0, &Instruction::vload(block + offset, 0, XType::DWORD, 4, 1))?;
        let mut bytes = [0; 32];
        context.ds_read(0, &mut bytes).expect("data segment");
        for (i, word) in bytes.chunks_exact(8).enumerate() {
            let got = u64::from_le_bytes(word.try_into().expect("8 bytes"));
            assert_eq!(got, seed + offset / 8 + i as u64, "at {:#x}", block + offset);
        }
    }
    Ok(())
}

/// Every address of the block must end in an exception.
fn check_gone(context: &GruContext, block: u64) {
    for piece in 0..16u64 {
        let va = block + piece * (LENGTH / 16);
        let result = context.execute(0, &Instruction::vload(va, 0, XType::DWORD, 1, 1));
        assert!(
            matches!(result, Err(ExecuteError::Exception(_))),
            "{va:#x} is gone, but a load of it gave {result:?}"
        );
    }
}

#[test]
fn test_unmodified_program_when_it_changes_its_memory_leaves_no_translation() {
    if let Some(reason) = processes::missing_capability() {
        println!("SKIP: unmodified program: {reason}");
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("program");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/preload_program/program.c");
    match Command::new("cc")
        .args(["-O1", "-Wall", "-o"])
        .arg(&path)
        .arg(&source)
        .status()
    {
        Ok(status) => assert!(status.success(), "cc failed on {}", source.display()),
        Err(e) => {
            println!("SKIP: unmodified program: no C compiler (cc): {e}");
            return;
        }
    }
    assert!(
        agent_library().exists(),
        "{} is not there: cargo build --release --workspace",
        agent_library().display()
    );

    let (gru, socket) = (dir.path().join("gru.sock"), dir.path().join("host.sock"));
    let (gru_name, socket_name) = (gru.display().to_string(), socket.display().to_string());
    let _device = start(&["device", "--model", "gru", "--socket", &gru_name], &gru);
    let _host = start(
        &["host", "--socket", &socket_name, "--device", &gru_name],
        &socket,
    );
    let me = Agent::attach(&AttachOptions {
        socket: socket.clone(),
        name: "test".into(),
    })
    .expect("attach");

    for round in 0..3 {
        let mut program = Program::start(&path, &socket, false);
        let block = program.address("map");
        let context = me
            .create_context_on(program.child.0.id(), &options())
            .expect("a context on the program");
        check(&context, block, 1000).expect("loads of mapped memory");

        // A store by the device is seen by the program.
        let op = Instruction::gamer(block, ExplicitOp::ADD, 7 + round, 0, XType::DWORD);
        let done = context.execute(0, &op).expect("an atomic");
        assert_eq!(done.avalue, 1000);
        assert_eq!(program.tell("value"), (1007 + round).to_string());
        let op = Instruction::gamer(block, ExplicitOp::SWAP, 1000, 0, XType::DWORD);
        context.execute(0, &op).expect("an atomic");

        let moved = program.address("move");
        assert_ne!(moved, block);
        check_gone(&context, block);
        check(&context, moved, 1000).expect("loads of moved memory");

        program.tell("protect");
        check(&context, moved, 1000).expect("loads of read-only memory");
        let store = context.execute(0, &Instruction::vset(moved, 1, XType::DWORD, 1, 1));
        assert!(
            matches!(store, Err(ExecuteError::Exception(_))),
            "a store to read-only memory gave {store:?}"
        );

        program.tell("unmap");
        check_gone(&context, moved);
    }

    // With its malloc on a memfd arena, too.
    let mut program = Program::start(&path, &socket, true);
    let heap = program.address("allocate");
    let context = me
        .create_context_on(program.child.0.id(), &options())
        .expect("a context on the program");
    check(&context, heap, 5000).expect("loads of the heap");
    drop(context);

    // Without it, malloc's memory is private and the exception says that nothing is there.
    let mut program = Program::start(&path, &socket, false);
    let heap = program.address("allocate");
    let context = me
        .create_context_on(program.child.0.id(), &options())
        .expect("a context on the program");
    check_gone(&context, heap);
}

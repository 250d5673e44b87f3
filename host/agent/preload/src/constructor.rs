//! What happens before main.

use agent::{Agent, AttachOptions};
use std::path::PathBuf;

/// Status of a program that was to be attached and could not.
const NOT_ATTACHED: i32 = 111;

#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = start;

fn is_on(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|v| v == "1")
}

extern "C" fn start() {
    let Some(socket) = std::env::var_os("TLBRIDGE_SOCKET").filter(|s| !s.is_empty()) else {
        return;
    };
    let name = std::env::current_exe()
        .ok()
        .and_then(|p| Some(p.file_name()?.to_string_lossy().into_owned()))
        .unwrap_or_else(|| "program".into());
    let options = AttachOptions {
        socket: PathBuf::from(socket),
        name,
    };
    let result = Agent::attach(&options)
        .map_err(|e| e.to_string())
        .and_then(|agent| {
            if is_on("TLBRIDGE_HEAP") {
                crate::heap::start(agent)
            } else {
                Ok(())
            }
        });
    if let Err(why) = result {
        let required = is_on("TLBRIDGE_REQUIRED");
        let end = if required {
            "giving up"
        } else {
            "running without it"
        };
        eprintln!("tlbridge agent: {why}; {end}");
        if required {
            // SAFETY: before main; nothing has to be cleaned up.
            unsafe { libc::_exit(NOT_ATTACHED) };
        }
    }
}

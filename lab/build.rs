//! The sources of the kernel shim go into the library as data, so that an installed program can build them
//! for the lab's kernel as well as one that runs in the source tree.

use std::fmt::Write as _;
use std::path::Path;

fn main() {
    let manifest = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it");
    let sources = Path::new(&manifest).join("../driver/kmod/gru");
    println!("cargo::rerun-if-changed={}", sources.display());
    let mut table = String::from("&[\n");
    let mut names = Vec::new();
    collect(&sources, String::new(), &mut names);
    names.sort();
    for name in names {
        let path = sources.join(&name);
        println!("cargo::rerun-if-changed={}", path.display());
        writeln!(
            table,
            "    ({name:?}, include_bytes!({:?}) as &[u8]),",
            path.display().to_string()
        )
        .expect("writing to a String");
    }
    table.push_str("]\n");
    let out = std::env::var("OUT_DIR").expect("cargo sets it");
    std::fs::write(Path::new(&out).join("shim_sources.rs"), table).expect("writing the table");
}

/// Files below the directory, by their path in it; what a build left is not there.
fn collect(directory: &Path, prefix: String, names: &mut Vec<String>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name().into_string().expect("file names are UTF-8");
        let path = entry.path();
        if path.is_dir() {
            collect(&path, format!("{prefix}{name}/"), names);
        } else if !name.starts_with('.')
            && !["o", "ko", "mod", "cmd", "order", "symvers"]
                .iter()
                .any(|e| path.extension().is_some_and(|x| x == *e))
        {
            names.push(format!("{prefix}{name}"));
        }
    }
}

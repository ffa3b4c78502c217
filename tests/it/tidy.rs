//! Style as a test: who may import whom, where `unsafe` may be, how long a file may grow.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Before its tests, a file that is longer is asked for a split by responsibility.
const LINES_MAX: usize = 600;

/// Which modules of the crate each may name. Imports point down; what is not here may name nothing of the crate.
const LAYERS: &[(&str, &[&str])] = &[
    ("types", &[]),
    ("error", &[]),
    ("state_files", &[]),
    ("switches", &[]),
    ("spec", &["switches", "types"]),
    ("wire", &["error", "spec", "types"]),
    ("engine", &["spec", "switches", "types", "wire"]),
    ("host", &["error", "spec", "types", "wire"]),
    ("hostd", &["engine", "error", "host", "spec", "state_files", "types", "wire"]),
    ("api", &["spec", "switches", "types", "wire", "error"]),
    ("store", &["error", "spec", "state_files", "switches", "types", "wire"]),
    ("changes", &["types"]),
    ("host_client", &["error", "types", "wire"]),
    ("auth", &["error", "store", "types", "changes"]),
    ("tasks", &["changes", "error", "store", "types"]),
    ("images", &["changes", "error", "host_client", "spec", "store", "tasks", "types", "wire", "auth"]),
    (
        "guests",
        &[
            "api",
            "auth",
            "changes",
            "error",
            "host_client",
            "images",
            "spec",
            "state_files",
            "store",
            "switches",
            "tasks",
            "types",
            "wire",
        ],
    ),
    (
        "web",
        &[
            "api",
            "auth",
            "changes",
            "error",
            "guests",
            "host",
            "host_client",
            "images",
            "spec",
            "state_files",
            "store",
            "switches",
            "tasks",
            "types",
            "wire",
        ],
    ),
    ("admin", &["auth", "error", "host", "store", "types", "web"]),
    ("cli", &["admin", "api", "error", "host", "spec", "state_files", "switches", "types", "wire"]),
    ("lib", &[]),
    ("main", &[]),
];

/// The only files with `unsafe`, each with its reason at its top.
const UNSAFE_FILES: &[&str] = &[
    "src/engine/memory.rs",
    "src/engine/tap.rs",
    "src/engine/uring.rs",
    "src/engine/vcpu.rs",
    "src/engine/vcpu_state.rs",
    "src/engine/vhost.rs",
    "src/engine/vm.rs",
    "src/host/sys.rs",
    "src/main.rs",
];

/// Crates that only one part names.
const CRATES: &[(&str, &[&str])] = &[
    ("rusqlite", &["src/store/"]),
    ("actix_web", &["src/web/"]),
    ("actix_http", &["src/web/"]),
    ("askama", &["src/web/"]),
    ("tokio_tungstenite", &["src/web/", "src/cli/console.rs"]),
    ("argon2", &["src/auth"]),
    (
        "kvm_ioctls",
        &["src/engine/vm.rs", "src/engine/vcpu.rs", "src/engine/vcpu_state.rs", "src/engine/start_state.rs"],
    ),
    ("imago", &["src/images/"]),
    ("io_uring", &["src/engine/uring.rs"]),
    ("rcgen", &["src/web/tls"]),
];

fn sources() -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut folders = vec![PathBuf::from(ROOT).join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") {
                let name = path.strip_prefix(ROOT).unwrap().to_string_lossy().into_owned();
                found.insert(name, fs::read_to_string(&path).unwrap());
            }
        }
    }
    assert!(found.len() > 20, "the sources are here");
    found
}

/// What a file has before its unit tests, without comments.
fn code(text: &str) -> String {
    let before_tests = text.split("\n#[cfg(test)]").next().unwrap_or_default();
    before_tests.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

fn module(path: &str) -> String {
    let inside = Path::new(path).strip_prefix("src").unwrap();
    let first = inside.components().next().unwrap().as_os_str().to_string_lossy().into_owned();
    first.trim_end_matches(".rs").to_owned()
}

/// Modules of the crate that the code names: `crate::a`, and `crate::{a, b::c}`.
fn imports(code: &str) -> BTreeSet<String> {
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut found = BTreeSet::new();
    for (at, start) in code.match_indices("crate::") {
        if code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let rest = &code[at + start.len()..];
        let Some(group) = rest.strip_prefix('{') else {
            found.insert(word(rest));
            continue;
        };
        let (mut depth, mut expects_name) = (0, true);
        for (offset, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => expects_name = true,
                c if depth == 0 && expects_name && c.is_alphabetic() => {
                    found.insert(word(&group[offset..]));
                    expects_name = false;
                }
                _ => {}
            }
        }
    }
    found
}

#[test]
fn imports_point_down() {
    let layers: BTreeMap<&str, &[&str]> = LAYERS.iter().copied().collect();
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let own = module(&path);
        let Some(allowed) = layers.get(own.as_str()) else {
            wrong.push(format!("{path}: the module {own} has no place in LAYERS"));
            continue;
        };
        for name in imports(&code(&text)) {
            if name != own && layers.contains_key(name.as_str()) && !allowed.contains(&name.as_str()) {
                wrong.push(format!("{path}: {own} must not import {name}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn unsafe_is_only_where_it_is_named() {
    for (path, text) in sources() {
        let has = code(&text).contains("unsafe ")
            || text.contains("expect(unsafe_code")
            || text.contains("allow(unsafe_code");
        assert_eq!(
            has,
            UNSAFE_FILES.contains(&path.as_str()),
            "{path}: unsafe code, or a file listed for it without any"
        );
    }
}

#[test]
fn each_crate_is_named_where_it_belongs() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let code = code(&text);
        for (name, places) in CRATES {
            if code.contains(&format!("{name}::")) && !places.iter().any(|place| path.starts_with(place)) {
                wrong.push(format!("{path} names {name}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn files_begin_with_what_they_are_and_end_in_time() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        if !text.starts_with("//! ") {
            wrong.push(format!("{path}: the first line says what the file is"));
        }
        let lines = text.split("\n#[cfg(test)]").next().unwrap_or_default().lines().count();
        if lines > LINES_MAX && !path.contains("/tests") {
            wrong.push(format!("{path}: {lines} lines before its tests"));
        }
        for word in ["todo!(", "unimplemented!(", "#[ignore", "dbg!("] {
            if text.contains(word) {
                wrong.push(format!("{path}: {word}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The engine is compiled into the fuzz targets too, by a package of their own.
#[test]
fn the_fuzz_targets_take_the_same_crates() {
    let lines = |file: &str| -> BTreeSet<String> {
        let text = fs::read_to_string(Path::new(ROOT).join(file)).unwrap();
        text.lines().map(|line| line.split(" #").next().unwrap_or_default().to_owned()).collect()
    };
    let ours = lines("Cargo.toml");
    let others: Vec<String> = lines("tests/fuzz/Cargo.toml")
        .into_iter()
        .filter(|line| line.contains("\"=") || line.contains("version ="))
        .filter(|line| !line.starts_with("version =") && !ours.contains(line))
        .collect();
    assert!(others.is_empty(), "other than in Cargo.toml: {others:?}");
}

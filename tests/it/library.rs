//! The image library over HTTPS: what arrives, what is refused, what is left behind.

use std::{
    fs,
    io::{Read, Write},
    net::TcpListener,
    os::unix::fs::{FileExt, MetadataExt},
};

use innkeeper::wire::{HostRequest, Place};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::support::{Answer, Client, TestApp, eventually};

fn iso() -> Vec<u8> {
    let mut bytes = vec![0; 40 << 10];
    bytes[32_769..32_774].copy_from_slice(b"CD001");
    bytes
}

fn sum(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn put(client: &mut Client, query: &str, bytes: &[u8]) -> Answer {
    let csrf = client.csrf.clone();
    client.send("PUT", &format!("/api/v1/images/upload?{query}"), &[("x-csrf-token", &csrf)], bytes)
}

fn ready(app: &TestApp) -> (Client, usize) {
    let mut client = app.administrator();
    client.get("/images");
    (client, files(app))
}

fn files(app: &TestApp) -> usize {
    fs::read_dir(app.path("images")).unwrap().count()
}

/// No image and no file is there any more.
fn nothing_is_left(app: &TestApp, client: &mut Client) {
    eventually("the unfinished image is gone", || {
        files(app) == 0 && client.get("/api/v1/images").json().as_array().unwrap().is_empty()
    });
}

fn ended(client: &mut Client, task: &Value) -> Value {
    let path = format!("/api/v1/tasks/{}", task.as_str().unwrap());
    eventually("the task ends", || client.get(&path).json()["state"] != "running");
    client.get(&path).json()
}

#[test]
fn an_upload_is_kept_whole_with_its_sum() {
    let app = TestApp::start();
    let (mut client, _) = ready(&app);
    let answer = put(&mut client, &format!("name=debian.iso&sha256={}", sum(&iso())), &iso());
    assert_eq!(answer.status, 201, "{}", answer.text());
    let id = answer.json()["image"].as_str().unwrap().to_owned();
    let image = client.get("/api/v1/images/debian.iso").json();
    assert_eq!((image["kind"].as_str(), image["state"].as_str()), (Some("iso"), Some("ready")));
    assert_eq!((image["size_bytes"].as_u64(), image["sha256"].as_str()), (Some(40 << 10), Some(sum(&iso()).as_str())));
    assert_eq!(fs::read(app.path(&format!("images/{id}.raw"))).unwrap(), iso());
    assert!(client.get("/images").text().contains("debian.iso"));
    assert_eq!(client.call("DELETE", "/api/v1/images/debian.iso", &json!(null)).status, 204);
    nothing_is_left(&app, &mut client);
}

#[test]
fn wrong_uploads_get_a_sentence_at_their_field_and_leave_nothing() {
    let app = TestApp::start();
    let (mut client, _) = ready(&app);
    let zip = b"PK\x03\x04 and more".to_vec();
    let cases: [(&str, Vec<u8>, u16, &str, &str); 8] = [
        ("name=a", vec![], 422, "file", "empty"),
        ("name=debian.iso", zip, 422, "file", "zip archive"),
        ("name=debian.iso", vec![1; 4096], 422, "file", "called iso"),
        ("name=..%2Fevil", iso(), 422, "name", "A name starts with"),
        ("name=", iso(), 422, "name", "A name is needed"),
        ("name=a&sha256=abc", iso(), 422, "sha256", "64 hexadecimal digits"),
        (&format!("name=a&sha256={}", "0".repeat(64)), iso(), 422, "sha256", "nothing was kept"),
        ("name=a&kind=floppy", iso(), 422, "kind", "An image is"),
    ];
    for (query, bytes, status, field, word) in cases {
        let answer = put(&mut client, query, &bytes);
        assert_eq!(answer.status, status, "{query}: {}", answer.text());
        assert_eq!(answer.json()["field"], field, "{query}: {}", answer.text());
        assert!(answer.text().contains(word), "{query}: {}", answer.text());
    }
    nothing_is_left(&app, &mut client);
    assert_eq!(put(&mut client, "name=a", &iso()).status, 201);
    assert_eq!(put(&mut client, "name=&file=my+disk.iso", &iso()).status, 201);
    assert_eq!(client.get("/api/v1/images/my-disk.iso").status, 200, "a file's own name is made usable");
    assert_eq!(client.call("DELETE", "/api/v1/images/my-disk.iso", &json!(null)).status, 204);
    let twice = put(&mut client, "name=a", &iso());
    assert_eq!((twice.status, twice.json()["field"].as_str().unwrap()), (409, "name"));
    assert_eq!(files(&app), 1);
}

#[test]
fn an_upload_that_breaks_or_cannot_fit_leaves_nothing() {
    let app = TestApp::start();
    let (mut client, _) = ready(&app);
    let mut raw = Client::raw(&app);
    raw.write_all(client.head("PUT", "/api/v1/images/upload?name=cut.iso", "Content-Length: 100000\r\n").as_bytes())
        .unwrap();
    raw.write_all(&iso()).unwrap();
    raw.flush().unwrap();
    eventually("the upload has begun", || client.get("/api/v1/images").text().contains("cut.iso"));
    drop(raw);
    nothing_is_left(&app, &mut client);
    let mut raw = Client::raw(&app);
    let huge = format!("Content-Length: {}\r\n", 1u64 << 60);
    raw.write_all(client.head("PUT", "/api/v1/images/upload?name=huge", &huge).as_bytes()).unwrap();
    let mut head = [0; 12];
    raw.read_exact(&mut head).unwrap();
    assert_eq!(&head, b"HTTP/1.1 507");
    nothing_is_left(&app, &mut client);
}

#[test]
fn a_browser_without_javascript_uploads_too() {
    let app = TestApp::start();
    let (mut client, _) = ready(&app);
    let body = |csrf: &str, name: &str, file: &[u8]| {
        let mut body = Vec::new();
        for (field, value) in [("csrf", csrf), ("name", name)] {
            body.extend(format!("--B\r\nContent-Disposition: form-data; name=\"{field}\"\r\n\r\n{value}\r\n").bytes());
        }
        body.extend(b"--B\r\nContent-Disposition: form-data; name=\"file\"; filename=\"my disk.iso\"\r\n\r\n");
        body.extend(file);
        body.extend(b"\r\n--B--\r\n");
        body
    };
    let origin = format!("https://localhost:{}", app.port);
    let headers = [("content-type", "multipart/form-data; boundary=B"), ("origin", origin.as_str())];
    let csrf = client.csrf.clone();
    let refused = client.send("POST", "/images/upload", &headers, &body("wrong", "", &iso()));
    assert_eq!(refused.status, 403);
    let empty = client.send("POST", "/images/upload", &headers, &body(&csrf, "x", b""));
    assert_eq!(empty.status, 422);
    assert!(empty.text().contains("This file is empty."), "{}", empty.text());
    nothing_is_left(&app, &mut client);
    let answer = client.send("POST", "/images/upload", &headers, &body(&csrf, "", &iso()));
    assert_eq!((answer.status, answer.location()), (303, Some("/images")), "{}", answer.text());
    assert_eq!(client.get("/api/v1/images/my-disk.iso").json()["kind"], "iso");
    let with_kind = |kind: &str| {
        let name = format!("as-{kind}\r\n--B\r\nContent-Disposition: form-data; name=\"kind\"\r\n\r\n{kind}");
        body(&csrf, &name, &iso())
    };
    assert_eq!(client.send("POST", "/images/upload", &headers, &with_kind("disk")).status, 303);
    assert_eq!(client.get("/api/v1/images/as-disk").json()["kind"], "disk", "what was chosen is not guessed");
    assert_eq!(client.send("POST", "/images/upload", &headers, &with_kind("sofa")).status, 422);
}

/// A server that answers each request with these bytes, and says how many it will send.
fn origin(bytes: Vec<u8>, promised: usize) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut socket in listener.incoming().take(3).flatten() {
            let mut head = [0; 1024];
            let _ = socket.read(&mut head);
            let _ = socket.write_all(
                format!("HTTP/1.1 200 OK\r\nContent-Length: {promised}\r\nConnection: close\r\n\r\n").as_bytes(),
            );
            let _ = socket.write_all(&bytes);
        }
    });
    format!("http://{address}/pub/netinst.iso")
}

#[test]
fn an_address_is_fetched_by_a_task() {
    let app = TestApp::start();
    let (mut client, _) = ready(&app);
    let url = origin(iso(), iso().len());
    let added = client.call("POST", "/api/v1/images", &json!({"url": url, "sha256": sum(&iso())}));
    assert_eq!(added.status, 202, "{}", added.text());
    let task = ended(&mut client, &added.json()["task"]);
    assert_eq!(task["state"], "done", "{task}");
    assert_eq!(task["title"], "Fetch netinst.iso");
    assert_eq!(client.get("/api/v1/images/netinst.iso").json()["kind"], "iso");
    assert_eq!(client.get(&format!("/tasks/{}", task["id"].as_str().unwrap())).status, 200);
}

#[test]
fn a_fetch_that_fails_says_why_and_leaves_nothing() {
    let app = TestApp::start();
    let (mut client, _) = ready(&app);
    let cases = [
        (json!({"url": origin(iso(), 1 << 20), "name": "a"}), "The connection to 127.0.0.1 broke"),
        (
            json!({"url": origin(iso(), iso().len()), "sha256": "0".repeat(64), "name": "b"}),
            "The SHA-256 of what arrived",
        ),
        (json!({"url": origin(b"<!doctype html>".to_vec(), 15), "name": "c"}), "web page"),
        (json!({"url": "http://127.0.0.1:9/x", "name": "d"}), "127.0.0.1 does not give it"),
    ];
    for (body, why) in cases {
        let added = client.call("POST", "/api/v1/images", &body);
        assert_eq!(added.status, 202, "{}", added.text());
        let task = ended(&mut client, &added.json()["task"]);
        assert_eq!(task["state"], "failed");
        assert!(task["error"].as_str().unwrap().contains(why), "{task}");
    }
    nothing_is_left(&app, &mut client);
    for url in ["file:///etc/shadow", "ftp://a/b", "nonsense"] {
        let answer = client.post("/images/fetch", &[("url", url)]);
        assert_eq!(answer.status, 422, "{url}");
        assert!(answer.text().contains("ddress"), "{}", answer.text());
    }
}

#[test]
fn a_fetch_is_cancelled() {
    let app = TestApp::start();
    let (mut client, _) = ready(&app);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/endless", listener.local_addr().unwrap());
    let source = std::thread::spawn(move || {
        let mut socket = listener.accept().unwrap().0;
        let _ = socket.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
        while socket.write_all(&[1; 4096]).is_ok() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    });
    let added = client.call("POST", "/api/v1/images", &json!({"url": url})).json();
    let task = added["task"].as_str().unwrap().to_owned();
    let arriving = client.call("DELETE", "/api/v1/images/endless", &json!(null));
    assert_eq!(arriving.status, 409, "{}", arriving.text());
    assert_eq!(client.post(&format!("/tasks/{task}/cancel"), &[]).status, 303);
    assert_eq!(ended(&mut client, &added["task"])["state"], "cancelled");
    nothing_is_left(&app, &mut client);
    source.join().unwrap();
}

#[test]
fn a_file_of_the_host_stays_where_it_is() {
    let app = TestApp::start();
    let (mut client, _) = ready(&app);
    let path = app.path("kernel");
    let mut kernel = vec![0; 4096];
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    fs::write(&path, &kernel).unwrap();
    let path = path.to_str().unwrap();
    let added = client.call("POST", "/api/v1/images", &json!({"host_path": path}));
    assert_eq!(added.status, 201, "{}", added.text());
    let image = client.get("/api/v1/images/kernel").json();
    assert_eq!((image["kind"].as_str(), image["host_path"].as_str()), (Some("kernel"), Some(path)));
    let asked = app.asked.lock().unwrap().clone();
    assert!(asked.contains(&HostRequest::OpenFile(Place::Host(path.into()))), "the supervisor opens it: {asked:?}");
    let long = format!("/{}", "a/".repeat(2048));
    let cases = [
        (path, "already, as"),
        ("/no/such/file", "Cannot open"),
        ("relative", "begins with"),
        ("/", "not a file"),
        (&long, "No path is that long"),
    ];
    for (path, word) in cases {
        let answer = client.post("/images/host", &[("path", path), ("name", "other")]);
        assert_eq!(answer.status, 422, "{path}: {}", answer.text());
        assert!(answer.text().contains(word), "{path}: {}", answer.text());
    }
    assert_eq!(client.call("DELETE", "/api/v1/images/kernel", &json!(null)).status, 204);
    assert!(std::path::Path::new(path).exists(), "the host's file is the host's");
}

#[test]
fn an_image_in_use_stays_and_names_its_guests() {
    let app = TestApp::start();
    let (mut client, _) = ready(&app);
    let id = put(&mut client, "name=cd.iso", &iso()).json()["image"].as_str().unwrap().to_owned();
    let db = rusqlite::Connection::open(app.path("innkeeper.db")).unwrap();
    db.execute(
        "INSERT INTO guests (id, name, machine, desired, cpus, memory_bytes, boot, cd_image_id, network, mac, created_ms)
         VALUES ('aaaaaaaa', 'web01', 'pc-1', 'off', 1, 1048576, 'bios', ?1, 'none', '52:54:00:00:00:01', 0)",
        [&id],
    )
    .unwrap();
    let answer = client.call("DELETE", "/api/v1/images/cd.iso", &json!(null));
    assert_eq!(answer.status, 409);
    assert!(answer.text().contains("is used by web01"), "{}", answer.text());
    assert!(app.path(&format!("images/{id}.raw")).exists());
}

/// A qcow2 disk of 1 MiB with one cluster of data at 512 KiB; docs/interop/qcow2.txt of QEMU.
fn qcow2(backing: bool) -> Vec<u8> {
    const CLUSTER: usize = 64 << 10;
    let mut bytes = vec![0; 6 * CLUSTER];
    let put = |bytes: &mut Vec<u8>, at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(&mut bytes, 0, b"QFI\xfb\0\0\0\x03");
    if backing {
        put(&mut bytes, 8, &200u64.to_be_bytes());
        put(&mut bytes, 16, &11u32.to_be_bytes());
        put(&mut bytes, 200, b"/etc/shadow");
    }
    put(&mut bytes, 20, &16u32.to_be_bytes());
    put(&mut bytes, 24, &(1u64 << 20).to_be_bytes());
    put(&mut bytes, 36, &1u32.to_be_bytes());
    put(&mut bytes, 40, &(3 * CLUSTER as u64).to_be_bytes());
    put(&mut bytes, 48, &(CLUSTER as u64).to_be_bytes());
    put(&mut bytes, 56, &1u32.to_be_bytes());
    put(&mut bytes, 96, &4u32.to_be_bytes());
    put(&mut bytes, 100, &104u32.to_be_bytes());
    // Refcount table, refcount block, L1, L2, data.
    put(&mut bytes, CLUSTER, &(2 * CLUSTER as u64).to_be_bytes());
    (0..6).for_each(|n| put(&mut bytes, 2 * CLUSTER + 2 * n, &1u16.to_be_bytes()));
    put(&mut bytes, 3 * CLUSTER, &((1u64 << 63) | (4 * CLUSTER as u64)).to_be_bytes());
    put(&mut bytes, 4 * CLUSTER + 8 * 8, &((1u64 << 63) | (5 * CLUSTER as u64)).to_be_bytes());
    bytes[5 * CLUSTER..].fill(0xab);
    bytes
}

#[test]
fn qcow2_becomes_sparse_raw_and_never_follows_another_file() {
    let app = TestApp::start();
    let (mut client, _) = ready(&app);
    let refused = put(&mut client, "name=evil.qcow2", &qcow2(true));
    assert_eq!(refused.status, 422);
    assert!(refused.text().contains("backing file"), "{}", refused.text());
    nothing_is_left(&app, &mut client);
    let added = put(&mut client, "name=disk.qcow2", &qcow2(false));
    assert_eq!(added.status, 201, "{}", added.text());
    let task = ended(&mut client, &added.json()["task"]);
    assert_eq!(task["state"], "done", "{task}");
    let image = client.get("/api/v1/images/disk.qcow2").json();
    assert_eq!((image["kind"].as_str(), image["size_bytes"].as_u64()), (Some("disk"), Some(1 << 20)));
    let file = fs::File::open(app.path(&format!("images/{}.raw", image["id"].as_str().unwrap()))).unwrap();
    let mut bytes = vec![0; 1 << 20];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes[..512 << 10].iter().all(|byte| *byte == 0) && bytes[576 << 10..].iter().all(|byte| *byte == 0));
    assert!(bytes[512 << 10..576 << 10].iter().all(|byte| *byte == 0xab));
    assert!(file.metadata().unwrap().blocks() * 512 < 200 << 10, "it stays sparse");
    assert_eq!(files(&app), 1);
}

#[test]
fn what_a_killed_server_left_half_is_gone_at_the_next_start() {
    let app = TestApp::start();
    app.client().get("/login");
    let db = rusqlite::Connection::open(app.path("innkeeper.db")).unwrap();
    db.execute(
        "INSERT INTO images (id, name, kind, state, size_bytes, source, created_ms) VALUES ('aaaaaaaa', 'half', 'other', 'uploading', 0, 'upload', 0)",
        [],
    )
    .unwrap();
    drop(db);
    fs::write(app.path("images/aaaaaaaa.part"), b"half").unwrap();
    let app = app.restart();
    let mut client = app.administrator();
    nothing_is_left(&app, &mut client);
}

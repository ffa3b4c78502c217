//! The door as browsers and scripts meet it: real HTTPS, real files.

use std::{
    io::{Read, Write},
    net::TcpStream,
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use innkeeper::{
    admin,
    store::users::Role,
    wire::{Finding, HostAnswer, HostRequest, Verdict},
};
use serde_json::json;

use crate::support::{Client, PASSWORD, TestApp, escape, read_until, usual_host};

#[test]
fn every_answer_has_the_security_headers() {
    let app = TestApp::start();
    let mut client = app.client();
    for path in ["/nothing/here", "/login", "/api/v1/guests", "/assets/none.js"] {
        let answer = client.get(path);
        let policy = answer.header("content-security-policy").unwrap_or_else(|| panic!("{path}"));
        assert!(policy.contains("default-src 'self'") && policy.contains("frame-ancestors 'none'"), "{policy}");
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
    }
    assert!(client.get("/nothing/here").text().contains("There is nothing at this address."));
    let problem = client.get("/api/v1/nothing");
    assert_eq!(problem.header("content-type"), Some("application/problem+json"));
    assert_eq!((problem.status, problem.json()["status"].as_u64()), (404, Some(404)));
}

#[test]
fn the_set_up_link_makes_one_administrator_once() {
    let app = TestApp::start();
    let mut client = app.client();
    assert_eq!(client.get("/").location(), Some("/setup"));
    let token = admin::setup_token(app.state.path()).unwrap();
    assert!(client.get("/setup?token=wrong").text().contains("wrong or spent"));
    let page = client.get(&format!("/setup?token={token}"));
    assert!(page.text().contains("name=\"password_again\""), "opening the link does not spend it");
    let cases: [(&str, &str, &str, &str); 3] = [
        ("a/b", PASSWORD, PASSWORD, "A name starts with a letter"),
        ("ada", "short", "short", "at least 8 characters"),
        ("ada", PASSWORD, "another one", "The two passwords differ."),
    ];
    for (name, password, again, sentence) in cases {
        let answer = client
            .post("/setup", &[("token", &token), ("name", name), ("password", password), ("password_again", again)]);
        assert_eq!(answer.status, 422);
        assert!(answer.text().contains(sentence), "{}", answer.text());
        assert!(answer.text().contains(&format!("value=\"{name}\"")), "the form keeps what was typed");
    }
    let right = [("token", token.as_str()), ("name", "ada"), ("password", PASSWORD), ("password_again", PASSWORD)];
    let made = client.post("/setup", &right);
    assert_eq!((made.status, made.location()), (303, Some("/")));
    assert_eq!(app.client().post("/setup", &right).status, 403);
    assert_eq!(app.client().get(&format!("/setup?token={token}")).location(), Some("/login"));
}

#[test]
fn a_set_up_link_that_was_given_out_survives_a_restart_of_the_web_role() {
    let app = TestApp::start();
    app.client();
    let token = admin::setup_token(app.state.path()).unwrap();
    let app = app.restart();
    let page = app.client().get(&format!("/setup?token={token}"));
    assert!(page.text().contains("name=\"password_again\""), "{}", page.text());
}

#[test]
fn the_cookie_is_bound_to_this_server_and_out_of_reach_of_scripts() {
    let app = TestApp::start();
    app.administrator();
    let mut client = app.client();
    let answer = client.post("/login", &[("name", "ada"), ("password", PASSWORD), ("next", "//evil.example")]);
    let cookie = answer.header("set-cookie").unwrap();
    assert!(cookie.starts_with(&format!("__Host-innkeeper-{}=", app.port)), "{cookie}");
    for flag in ["Path=/", "Secure", "HttpOnly", "SameSite=Lax"] {
        assert!(cookie.contains(flag), "{cookie}");
    }
    assert_eq!(answer.location(), Some("/"), "nobody is sent elsewhere after logging in");
}

#[test]
fn strangers_are_led_to_the_login_and_back() {
    let app = TestApp::start();
    app.administrator();
    let mut stranger = app.client();
    assert_eq!(stranger.get("/").location(), Some("/login"));
    assert_eq!(stranger.get("/images?x=1").location(), Some("/login?next=/images%3Fx%3D1"));
    assert_eq!(stranger.get("/api/v1/images").status, 401);
    assert_eq!(stranger.get("/events?scope=home").status, 401);
    let wrong = stranger.post("/login", &[("name", "ada"), ("password", "wrong")]);
    assert_eq!(wrong.status, 422);
    assert!(wrong.text().contains("Name or password is wrong."));
    let right = stranger.post("/login", &[("name", "ada"), ("password", PASSWORD), ("next", "/images")]);
    assert_eq!(right.location(), Some("/images"));
    assert_eq!(stranger.get("/images").status, 200);
    for path in ["/trust", "/trust/ca.pem"] {
        assert_eq!(app.client().get(path).status, 200, "{path} needs no login");
    }
}

#[test]
fn logins_survive_a_restart_and_end_with_the_logout() {
    let app = TestApp::start();
    let client = app.administrator();
    let secret = client.cookie.clone().unwrap().split_once('=').unwrap().1.to_owned();
    let app = app.restart();
    let mut client = app.client();
    // The port is another one, and with it the cookie's name.
    client.cookie = Some(format!("__Host-innkeeper-{}={secret}", app.port));
    assert_eq!(client.get("/").status, 200);
    let mut stream = client.stream(&app, "/events?scope=tasks");
    read_until(&mut stream, "</hx-partial>");
    assert_eq!(client.post("/logout", &[]).location(), Some("/login"));
    // The last chunk, RFC 9112 section 7.1.
    read_until(&mut stream, "\r\n0\r\n\r\n");
    client.cookie = Some(format!("__Host-innkeeper-{}={secret}", app.port));
    assert_eq!(client.get("/api/v1/session").status, 401);
}

#[test]
fn foreign_pages_and_forms_without_the_token_change_nothing() {
    let app = TestApp::start();
    let mut client = app.administrator();
    client.get("/users");
    let form = |csrf: &str| format!("csrf={}&name=eve&role=viewer&password=long+enough", escape(csrf));
    let kind = ("content-type", "application/x-www-form-urlencoded");
    let origin = format!("https://localhost:{}", app.port);
    let csrf = client.csrf.clone();
    let cases: [(&[(&str, &str)], &str); 5] = [
        (&[kind, ("origin", "https://evil.example")], &csrf),
        (&[kind, ("origin", "null")], &csrf),
        (&[kind, ("sec-fetch-site", "cross-site")], &csrf),
        (&[kind, ("origin", &origin)], ""),
        (&[kind, ("origin", &origin)], "wrong"),
    ];
    for (headers, token) in cases {
        let answer = client.send("POST", "/users", headers, form(token).as_bytes());
        assert_eq!(answer.status, 403, "{headers:?} {token}");
    }
    let foreign = client.send("POST", "/login", &[kind, ("origin", "https://evil.example")], b"name=ada&password=x");
    assert_eq!(foreign.status, 403, "nobody is logged in by a foreign page");
    let plain = client.send("POST", "/api/v1/users", &[("content-type", "text/plain"), ("origin", &origin)], b"{}");
    assert_eq!(plain.status, 403);
    assert_eq!(client.get("/api/v1/users").json().as_array().unwrap().len(), 1);
    let right = client.send("POST", "/users", &[kind, ("origin", &origin)], form(&csrf).as_bytes());
    assert_eq!(right.location(), Some("/users"));
}

#[test]
fn roles_open_what_they_should() {
    let app = TestApp::start();
    let mut ada = app.administrator();
    ada.get("/users");
    for role in ["operator", "viewer"] {
        let answer = ada.post("/users", &[("name", role), ("role", role), ("password", PASSWORD)]);
        assert_eq!(answer.status, 303, "{}", answer.text());
    }
    let wrong = ada.post("/users", &[("name", "viewer"), ("role", "viewer"), ("password", PASSWORD)]);
    assert_eq!(wrong.status, 422);
    assert!(wrong.text().contains("already a user"));
    for (name, images, fetch, users) in [("viewer", 200, 403, 403), ("operator", 200, 422, 403), ("ada", 200, 422, 200)]
    {
        let mut client = app.client();
        client.log_in(name, PASSWORD);
        assert_eq!(client.get("/images").status, images, "{name}");
        assert_eq!(client.post("/images/fetch", &[("url", "")]).status, fetch, "{name}");
        assert_eq!(client.get("/users").status, users, "{name}");
        assert_eq!(client.get("/account").status, 200);
    }
}

#[test]
fn pages_are_whole() {
    let app = TestApp::start();
    let mut client = app.administrator();
    for path in ["/", "/images", "/tasks", "/host", "/users", "/account", "/about", "/trust"] {
        let answer = client.get(path);
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        assert!(answer.text().contains("Log out"), "{path}");
        assert!(!answer.text().contains("style="), "{path}: the policy forbids it");
    }
    for path in
        ["/api/v1/session", "/api/v1/host", "/api/v1/networks", "/api/v1/tasks", "/api/v1/audit", "/api/v1/tokens"]
    {
        assert_eq!(client.get(path).status, 200, "{path}");
    }
    assert_eq!(client.get("/api/v1/session").json()["role"], "administrator");
    assert_eq!(client.get("/api/v1/host").json()["findings"][0]["id"], "kvm");
}

#[test]
fn what_the_host_lacks_is_said_on_the_first_page_with_the_remedy_on_its_own() {
    let app = TestApp::with_host(|request, state| match request {
        HostRequest::Doctor => {
            let finding = Finding {
                id: "kvm".into(),
                title: "KVM".into(),
                verdict: Verdict::Missing,
                detail: "There is no /dev/kvm.".into(),
                remedy: "Switch virtualization on in the firmware setup.".into(),
                essential: true,
            };
            Ok((HostAnswer::Findings(vec![finding]), vec![]))
        }
        other => usual_host(other, state),
    });
    let mut client = app.administrator();
    for path in ["/", "/guests", "/host"] {
        assert!(client.get(path).text().contains("There is no /dev/kvm."), "{path}");
    }
    assert!(client.get("/host").text().contains("Switch virtualization on"));
}

#[test]
fn a_token_does_what_its_user_may_without_cookie_or_origin() {
    let app = TestApp::start();
    let mut ada = app.administrator();
    ada.get("/users");
    let page = ada.post("/tokens", &[("token_name", "ci")]);
    assert_eq!(page.status, 201);
    let made = ada.call("POST", "/api/v1/tokens", &json!({"name": "second"})).json();
    let bearer = format!("Bearer {}", made["token"].as_str().unwrap());
    let mut script = app.client();
    let session = script.send("GET", "/api/v1/session", &[("authorization", &bearer)], b"");
    assert_eq!(session.json()["name"], "ada");
    let headers = [("authorization", bearer.as_str()), ("content-type", "application/json")];
    let user = json!({"name": "bob", "role": "viewer", "password": PASSWORD}).to_string();
    assert_eq!(script.send("POST", "/api/v1/users", &headers, user.as_bytes()).status, 201);
    assert_eq!(script.send("GET", "/api/v1/session", &[("authorization", "Bearer wrong")], b"").status, 401);
    let id = ada.get("/api/v1/tokens").json()[1]["id"].as_str().unwrap().to_owned();
    assert_eq!(ada.call("DELETE", &format!("/api/v1/tokens/{id}"), &json!(null)).status, 204);
    assert_eq!(script.send("GET", "/api/v1/session", &[("authorization", &bearer)], b"").status, 401);
}

#[test]
fn the_api_says_which_content_type_it_takes() {
    let app = TestApp::start();
    let mut client = app.administrator();
    client.get("/users");
    let secret = client.call("POST", "/api/v1/tokens", &json!({"name": "ci"})).json();
    let bearer = format!("Bearer {}", secret["token"].as_str().unwrap());
    let mut script = app.client();
    let form = [("authorization", bearer.as_str()), ("content-type", "application/x-www-form-urlencoded")];
    for path in ["/api/v1/guests", "/api/v1/users", "/api/v1/images"] {
        let answer = script.send("POST", path, &form, br#"{"name":"web01"}"#);
        assert_eq!((answer.status, answer.header("content-type")), (422, Some("application/problem+json")), "{path}");
        assert!(answer.text().contains("Content-Type: application/json"), "{}", answer.text());
    }
    let empty = script.send("POST", "/api/v1/guests", &form[..1], b"");
    assert!(empty.status == 422 && empty.text().contains("application/json"), "{}", empty.text());
}

#[test]
fn the_own_password_is_changed_with_the_old_one() {
    let app = TestApp::start();
    let mut client = app.administrator();
    client.get("/account");
    let change = |client: &mut Client, current: &str, new: &str, again: &str| {
        client.post("/account", &[("current", current), ("password", new), ("password_again", again)])
    };
    assert!(change(&mut client, "wrong", "even longer", "even longer").text().contains("This is not your password."));
    assert!(change(&mut client, PASSWORD, "short", "short").text().contains("at least 8 characters"));
    assert!(change(&mut client, PASSWORD, "even longer", "other").text().contains("The two passwords differ."));
    assert_eq!(change(&mut client, PASSWORD, "even longer", "even longer").status, 303);
    assert_eq!(client.get("/account").status, 200, "this login goes on");
    app.client().log_in("ada", "even longer");
}

#[test]
fn the_socket_knows_its_peer() {
    let app = TestApp::start();
    app.client();
    let mut socket = UnixStream::connect(app.path("run/api.sock")).unwrap();
    socket.write_all(b"GET /api/v1/session HTTP/1.1\r\nHost: innkeeper\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("\"name\":\"host:") && answer.contains("\"role\":\"administrator\""), "{answer}");
}

#[test]
fn plain_http_is_sent_to_https_and_noise_is_not_answered() {
    let app = TestApp::start();
    app.client();
    let ask = |bytes: &[u8]| {
        let mut socket = TcpStream::connect(("127.0.0.1", app.port)).unwrap();
        socket.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    };
    let answer = ask(format!("GET /images HTTP/1.1\r\nHost: localhost:{}\r\n\r\n", app.port).as_bytes());
    assert!(answer.starts_with("HTTP/1.1 308"), "{answer}");
    assert!(answer.contains(&format!("Location: https://localhost:{}/images\r\n", app.port)), "{answer}");
    assert_eq!(ask(b"\x00\x01\x02noise"), "");
    assert!(ask(b"GET / HTTP/1.1\r\nHost: evil host\r\n\r\n").starts_with("HTTP/1.1 400"));
}

#[test]
fn the_server_ends_within_two_seconds_with_five_pages_open() {
    let mut app = TestApp::start();
    let client = app.administrator();
    let mut streams: Vec<_> = (0..5).map(|_| client.stream(&app, "/events?scope=home")).collect();
    streams.iter_mut().for_each(|stream| drop(read_until(stream, "</hx-partial>")));
    let mut upload = Client::raw(&app);
    upload
        .write_all(client.head("PUT", "/api/v1/images/upload?name=late", "Content-Length: 100000\r\n").as_bytes())
        .unwrap();
    upload.write_all(&[1; 1000]).unwrap();
    let took = app.stop();
    assert!(took < Duration::from_secs(2), "{took:?}");
}

#[test]
fn a_page_is_told_what_changes() {
    let app = TestApp::start();
    let mut client = app.administrator();
    client.get("/images");
    let mut page = client.stream(&app, "/events?scope=images");
    let first = read_until(&mut page, "</hx-partial>");
    assert!(
        first.contains("data: ") && first.contains("hx-target=\"#image-rows\"") && first.contains("No images yet"),
        "{first}"
    );
    let mut json = client.stream(&app, "/api/v1/events");
    let begun = Instant::now();
    let answer =
        client.send("PUT", "/api/v1/images/upload?name=new.img", &[("x-csrf-token", &client.csrf.clone())], &[7; 512]);
    assert_eq!(answer.status, 201, "{}", answer.text());
    assert!(read_until(&mut page, "new.img").contains("id: "));
    assert!(read_until(&mut json, "\n\n").contains("\"kind\":\"images\""));
    assert!(begun.elapsed() < Duration::from_secs(2));
}

#[test]
fn a_user_of_another_process_comes_in_at_once() {
    let app = TestApp::start();
    app.client();
    admin::create_user(app.state.path(), "ops", Role::Operator, PASSWORD).unwrap();
    let mut client = app.client();
    client.log_in("ops", PASSWORD);
    admin::reset_password(app.state.path(), "ops", "another one").unwrap();
    assert_eq!(client.get("/api/v1/session").status, 401, "a reset password ends the login");
}

#[test]
fn the_events_of_home_are_for_administrators() {
    let app = TestApp::start();
    let mut ada = app.administrator();
    ada.get("/users");
    ada.call("POST", "/api/v1/users", &json!({"name": "vic", "role": "viewer", "password": PASSWORD}));
    let shows = |client: &mut Client| client.get("/").text().contains("user vic");
    assert!(shows(&mut ada));
    let mut vic = app.client();
    vic.log_in("vic", PASSWORD);
    assert!(!shows(&mut vic));
    assert_eq!(vic.get("/").status, 200);
}

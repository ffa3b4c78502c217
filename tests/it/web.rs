//! The server as browsers and scripts meet it: real HTTPS, real files.

use crate::support::TestApp;

#[test]
fn every_answer_has_the_security_headers() {
    let app = TestApp::start();
    let answer = app.client().get("/nothing/here");
    assert_eq!(answer.status, 404);
    let policy = answer.header("content-security-policy").unwrap();
    assert!(policy.contains("default-src 'self'") && policy.contains("frame-ancestors 'none'"), "{policy}");
    assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
    assert!(answer.text().contains("There is nothing at this address."));
    let problem = app.client().get("/api/v1/nothing");
    assert_eq!(problem.header("content-type"), Some("application/problem+json"));
    assert_eq!(problem.json()["status"], 404);
}

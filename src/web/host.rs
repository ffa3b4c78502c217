//! The host: what the doctor found, how full it is, networks, certificate.

use std::{
    fs,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use actix_web::{HttpResponse, http::StatusCode, web};
use serde::Serialize;

use super::{
    State,
    guard::Viewer,
    page::html,
    view::{
        Bytes, Chrome, Fact, Finding as Shown, Gauge, HostPage, Level, Moment, Need, NetworkLine, Percent, Tab,
        fingerprint,
    },
};
use crate::{
    error::{Error, ErrorKind, Result},
    host_client::HostClient,
    types::now_ms,
    wire::{Finding, HostAnswer, HostRequest, NetworkStatus, Verdict},
};

pub fn routes(app: &mut web::ServiceConfig) {
    app.route("/host", web::get().to(page))
        .route("/api/v1/host", web::get().to(api_host))
        .route("/api/v1/networks", web::get().to(api_networks));
}

/// Findings change when somebody works on the host; looking at a page again and again need not look again.
const FINDINGS_LAST: Duration = Duration::from_secs(20);

/// What the doctor found, remembered for a moment.
#[derive(Default)]
pub struct Findings(Mutex<Option<(Instant, Vec<Finding>)>>);

impl Findings {
    pub async fn get(&self, host: &HostClient) -> Result<Vec<Finding>> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((_, findings)) = known.filter(|(at, _)| at.elapsed() < FINDINGS_LAST) {
            return Ok(findings);
        }
        let (HostAnswer::Findings(findings), _) = host.call(HostRequest::Doctor).await? else {
            return Err(odd_answer());
        };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), findings.clone()));
        Ok(findings)
    }
}

/// What keeps guests from running at all, worst first. A supervisor that does not answer is said by its own error.
pub async fn obstacles(state: &State) -> Result<Vec<Finding>> {
    let mut findings = state.findings.get(&state.host).await?;
    findings.retain(|finding| finding.essential && finding.verdict == Verdict::Missing);
    Ok(findings)
}

/// The obstacles as the home page says them.
pub async fn needs(state: &State) -> Vec<Need> {
    let need =
        |text: String| Need { level: Level::Missing, text, button: "Show the host".into(), path: "/host".into() };
    match obstacles(state).await {
        Ok(findings) => {
            findings.into_iter().map(|finding| need(format!("{}: {}", finding.title, finding.detail))).collect()
        }
        Err(error) => vec![need(error.to_string())],
    }
}

pub async fn network_status(state: &State) -> Result<NetworkStatus> {
    match state.host.call(HostRequest::NetworkStatus).await? {
        (HostAnswer::NetworkStatus(status), _) => Ok(status),
        _ => Err(odd_answer()),
    }
}

fn odd_answer() -> Error {
    Error::new(ErrorKind::Internal, "The supervisor gave an answer that does not fit.")
}

/// A finding as pages show it.
pub fn shown(finding: Finding) -> Shown {
    Shown {
        level: match finding.verdict {
            Verdict::Ok => Level::Ok,
            Verdict::Degraded => Level::Degraded,
            Verdict::Missing => Level::Missing,
        },
        what: finding.title,
        detail: finding.detail,
        remedy: Some(finding.remedy).filter(|remedy| !remedy.is_empty()),
    }
}

/// Memory, disk and load of the host now.
pub fn gauges(state: &State) -> Vec<Gauge> {
    let gauge = |label, part: u64, whole: u64, words: String| Gauge {
        label,
        words,
        share: Percent::of(part, whole),
        history: vec![],
    };
    let mut gauges = Vec::new();
    if let Some((total, available)) = memory() {
        let used = total.saturating_sub(available);
        gauges.push(gauge("Memory", used, total, format!("{} of {}", Bytes(used), Bytes(total))));
    }
    if let Ok(found) = rustix::fs::statvfs(&state.state_dir) {
        let total = found.f_blocks.saturating_mul(found.f_frsize);
        let used = total.saturating_sub(found.f_bavail.saturating_mul(found.f_frsize));
        gauges.push(gauge("Disk", used, total, format!("{} of {}", Bytes(used), Bytes(total))));
    }
    let cpus = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    if let Some(hundredths) = load() {
        let words = format!("load {}.{:02} on {cpus} CPUs", hundredths / 100, hundredths % 100);
        gauges.push(gauge("CPU", hundredths, cpus * 100, words));
    }
    gauges
}

/// Total and available bytes, /proc/meminfo.
pub fn memory() -> Option<(u64, u64)> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line.trim_start_matches(':').trim().trim_end_matches("kB").trim().parse().ok()?;
        kib.checked_mul(1024)
    };
    Some((field("MemTotal")?, field("MemAvailable")?))
}

/// The load of the last minute in hundredths, /proc/loadavg.
fn load() -> Option<u64> {
    let text = fs::read_to_string("/proc/loadavg").ok()?;
    let (whole, part) = text.split(' ').next()?.split_once('.')?;
    whole.parse::<u64>().ok()?.checked_mul(100)?.checked_add(part.parse().ok()?)
}

/// `modes` are those of all guests.
fn networks(status: &NetworkStatus, modes: &[String]) -> Vec<NetworkLine> {
    let guests = |mode: &str| modes.iter().filter(|other| *other == mode).count();
    let mut lines = Vec::new();
    let problems = status.problems.join(" ");
    if let Some(nat) = &status.nat {
        let level = if problems.is_empty() { Level::Ok } else { Level::Degraded };
        let subnet = [nat.ipv4.as_str(), nat.ipv6.as_str()]
            .into_iter()
            .filter(|net| !net.is_empty())
            .collect::<Vec<_>>()
            .join(", ");
        lines.push(NetworkLine {
            name: nat.bridge.clone(),
            kind: "NAT",
            subnet,
            guests: guests("nat"),
            level,
            note: problems.clone(),
        });
    }
    lines.extend(status.bridges.iter().filter(|_| status.privileged).map(|bridge| NetworkLine {
        name: bridge.clone(),
        kind: "bridge",
        subnet: String::new(),
        guests: guests(&format!("bridge:{bridge}")),
        level: Level::Ok,
        note: String::new(),
    }));
    if lines.is_empty() && !problems.is_empty() {
        lines.push(NetworkLine {
            name: "nat".into(),
            kind: "NAT",
            subnet: String::new(),
            guests: guests("nat"),
            level: Level::Missing,
            note: problems,
        });
    }
    lines
}

fn facts(state: &State) -> Vec<Fact> {
    let fact = |label, value: String, copy| Fact { label, value, copy };
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map_or("", |(_, model)| model.trim());
    vec![
        fact("Name", state.host_name.clone(), true),
        fact("Processor", model.to_owned(), false),
        fact("CPUs", std::thread::available_parallelism().map_or(1, usize::from).to_string(), false),
        fact("Kernel", read("/proc/sys/kernel/osrelease"), false),
        fact("State", state.state_dir.display().to_string(), true),
        fact("Innkeeper", env!("CARGO_PKG_VERSION").to_owned(), false),
    ]
}

async fn host_page(state: &State, chrome: Chrome) -> Result<HostPage> {
    let certificate = &state.certificate;
    let modes: Vec<String> = state.guests.list().await?.iter().map(|guest| guest.row.network.to_string()).collect();
    Ok(HostPage {
        chrome,
        findings: state.findings.get(&state.host).await?.into_iter().map(shown).collect(),
        facts: facts(state),
        gauges: gauges(state),
        networks: networks(&network_status(state).await?, &modes),
        ca_fingerprint: fingerprint(&certificate.ca_sha256),
        leaf_fingerprint: fingerprint(&certificate.leaf_sha256),
        names: certificate.names.clone(),
        leaf_until: Moment::new(certificate.leaf_until_ms, now_ms()),
    })
}

async fn page(state: web::Data<State>, who: Viewer) -> Result<HttpResponse> {
    html(StatusCode::OK, &host_page(&state, state.chrome(&who, Tab::Host)).await?)
}

#[derive(Serialize)]
struct ApiHost {
    name: String,
    version: &'static str,
    cpus: usize,
    memory_bytes: u64,
    memory_available_bytes: u64,
    images_free_bytes: u64,
    findings: Vec<Finding>,
    certificate: ApiCertificate,
}

#[derive(Serialize)]
struct ApiCertificate {
    ca_sha256: String,
    leaf_sha256: String,
    names: Vec<String>,
    leaf_until_ms: i64,
}

async fn api_host(state: web::Data<State>, _: Viewer) -> Result<HttpResponse> {
    let (memory_bytes, memory_available_bytes) = memory().unwrap_or((0, 0));
    let certificate = &state.certificate;
    Ok(HttpResponse::Ok().json(ApiHost {
        name: state.host_name.clone(),
        version: env!("CARGO_PKG_VERSION"),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        memory_bytes,
        memory_available_bytes,
        images_free_bytes: state.images.free_bytes(),
        findings: state.findings.get(&state.host).await?,
        certificate: ApiCertificate {
            ca_sha256: fingerprint(&certificate.ca_sha256),
            leaf_sha256: fingerprint(&certificate.leaf_sha256),
            names: certificate.names.clone(),
            leaf_until_ms: certificate.leaf_until_ms,
        },
    }))
}

async fn api_networks(state: web::Data<State>, _: Viewer) -> Result<HttpResponse> {
    Ok(HttpResponse::Ok().json(network_status(&state).await?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_tells_its_memory_and_load() {
        let (total, available) = memory().unwrap();
        assert!(total > 64 << 20 && available <= total);
        assert!(load().is_some());
    }
}

//! The web role as a process: opens the state, starts the services, serves until the supervisor or a signal ends it.

use std::{
    io::Write,
    net::{SocketAddr, TcpListener},
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::PathBuf,
    time::Duration,
};

use actix_web::{App, middleware::from_fn, web};
use tokio::{
    runtime::{Builder, Handle},
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;

use super::{State, guard, listen, routes, tls, view::fingerprint};
use crate::{
    auth::{self, Auth},
    changes::Changes,
    error::{Error, ErrorKind, Result},
    guests::{self, Guests},
    host_client::HostClient,
    images::Images,
    state_files::check_entry,
    store::Store,
    tasks::Tasks,
};

/// What the supervisor hands to the web role.
pub struct WebRole {
    pub state_dir: PathBuf,
    pub run_dir: PathBuf,
    /// SOCK_SEQPACKET to `hostd`.
    pub hostd: OwnedFd,
    /// Bound and listening.
    pub listener: TcpListener,
    /// Bound and listening.
    pub api: UnixListener,
    /// Say where the server is, and make the set-up link while nobody is set up.
    pub announce: bool,
}

/// Handlers never block, so few threads do.
const WORKERS: usize = 2;
/// After this, connections that are still open are dropped. Whole seconds: the server takes no less.
const GRACE_S: u64 = 1;
/// Streams end by themselves when told; this is how long they get before the listeners close.
const STREAMS_END: Duration = Duration::from_millis(100);

/// Serves until SIGTERM, SIGINT or the end of `hostd`; ends within 2 s of it.
///
/// Errors: what keeps it from starting.
pub fn run(config: WebRole) -> Result<()> {
    let cannot = |error| Error::internal("Cannot start the server.", error);
    // Tasks block for long, such as a download that gets no bytes; only this runtime may be left without waiting for them.
    let background = Builder::new_current_thread().thread_name("task").build().map_err(cannot)?;
    let result = actix_rt::System::new().block_on(serve(config, background.handle().clone()));
    background.shutdown_background();
    result
}

async fn serve(config: WebRole, background: Handle) -> Result<()> {
    let cannot = |error| Error::internal("Cannot start the server.", error);
    let (listener, api) = (config.listener.try_clone().map_err(cannot)?, config.api.try_clone().map_err(cannot)?);
    let address = listener.local_addr().map_err(cannot)?;
    let first = config.announce;
    let state = web::Data::new(open(config, background).await?);
    let app = {
        let state = state.clone();
        move || App::new().app_data(state.clone()).wrap(from_fn(guard::guard)).configure(routes)
    };
    let server = actix_server::Server::build().workers(WORKERS).disable_signals().shutdown_timeout(GRACE_S);
    let server = listen::listen(server, listener, api, state.certificate.config.clone(), app).map_err(cannot)?.run();
    let handle = server.handle();
    let serving = actix_rt::spawn(server);
    if first {
        announce(&state, address).map_err(cannot)?;
    }

    let mut terminate = signal(SignalKind::terminate()).map_err(cannot)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot)?;
    tokio::select! {
        _ = terminate.recv() => tracing::info!("asked to end"),
        _ = interrupt.recv() => tracing::info!("interrupted"),
        () = state.host.gone() => tracing::info!("the supervisor has ended"),
    }
    state.ending.cancel();
    state.tasks.cancel_all();
    tokio::time::sleep(STREAMS_END).await;
    handle.stop(true).await;
    let _ = serving.await;
    Ok(())
}

/// Tells whoever started the server where it is, how the first administrator gets in, and how to know the certificate.
fn announce(state: &State, address: SocketAddr) -> std::io::Result<()> {
    // Refused once somebody is set up; then there is nothing to say.
    let token = state.store.write(auth::new_setup_token).ok();
    let text = announcement(&tls::urls(address), token.as_deref(), &fingerprint(&state.certificate.leaf_sha256));
    std::io::stdout().lock().write_all(text.as_bytes())
}

fn announcement(urls: &[String], setup_token: Option<&str>, fingerprint: &str) -> String {
    let mut lines = vec![format!("Innkeeper {} is at", env!("CARGO_PKG_VERSION"))];
    lines.extend(urls.iter().map(|url| format!("  {url}/")));
    if let Some(token) = setup_token {
        lines.push("Set up the first administrator, once:".to_owned());
        lines.extend(urls.iter().map(|url| format!("  {url}/setup?token={token}")));
    }
    lines.push(format!("SHA-256 of the certificate: {fingerprint}\n"));
    lines.join("\n")
}

async fn open(config: WebRole, background: Handle) -> Result<State> {
    check_entry(&config.state_dir).map_err(|why| Error::new(ErrorKind::Unavailable, why))?;
    let store = std::sync::Arc::new(Store::open(&config.state_dir)?);
    let certificate = tls::open(&config.state_dir)?;
    let (host, engines_gone) = HostClient::start(config.hostd)?;
    let changes = Changes::default();
    let tasks = Tasks::start(store.clone(), changes.clone(), background)?;
    let guests = Guests::start(guests::Parts {
        store: store.clone(),
        host: host.clone(),
        engines_gone,
        tasks: tasks.clone(),
        changes: changes.clone(),
        state_dir: config.state_dir.clone(),
        run_dir: config.run_dir.clone(),
    })
    .await?;
    let port = config.listener.local_addr().map_or(0, |address| address.port());
    let images = Images::start(store.clone(), changes.clone(), tasks.clone(), host.clone(), &config.state_dir)?;
    Ok(State {
        images,
        findings: Default::default(),
        auth: Auth::new(store.clone()),
        host,
        tasks,
        guests,
        certificate,
        ending: CancellationToken::new(),
        port,
        host_name: tls::host_name(),
        flashes: Default::default(),
        state_dir: config.state_dir,
        run_dir: config.run_dir,
        changes,
        store,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_set_up_link_is_there_for_each_address() {
        let urls = ["https://localhost:8443", "https://192.0.2.7:8443"].map(str::to_owned);
        let text = announcement(&urls, Some("T"), "AB");
        for url in &urls {
            assert!(
                text.contains(&format!("  {url}/\n")) && text.contains(&format!("  {url}/setup?token=T\n")),
                "{text}"
            );
        }
        assert!(!announcement(&urls, None, "AB").contains("setup"), "somebody is set up");
    }
}

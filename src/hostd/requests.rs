//! The closed set of what the web role may ask for. Everything in a request is checked again here.

use std::os::fd::OwnedFd;

use super::Hostd;
use crate::{
    error::Error,
    host,
    wire::{HostAnswer, HostRefusal, HostRequest},
};

/// Does what is asked. The descriptor, if any, goes with the answer.
pub(super) fn answer(hostd: &mut Hostd, request: HostRequest) -> (Result<HostAnswer, HostRefusal>, Option<OwnedFd>) {
    match carry_out(hostd, request) {
        Ok((answer, descriptor)) => (Ok(answer), descriptor),
        Err(error) => {
            tracing::info!("refused: {}", error.for_log());
            (Err(HostRefusal { kind: error.kind(), message: error.to_string() }), None)
        }
    }
}

fn carry_out(hostd: &mut Hostd, request: HostRequest) -> Result<(HostAnswer, Option<OwnedFd>), Error> {
    Ok(match request {
        HostRequest::StartEngine(launch) => {
            hostd.engines.start(&launch)?;
            (HostAnswer::Done, None)
        }
        HostRequest::KillEngine(guest) => {
            hostd.engines.kill(&guest);
            (HostAnswer::Done, None)
        }
        HostRequest::ListEngines => (HostAnswer::Engines(hostd.engines.list()), None),
        HostRequest::OpenFile(place) => {
            let file = hostd.files.open_to_read(&place)?;
            let size_bytes =
                file.metadata().map_err(|error| Error::internal("Cannot read the file's size.", error))?.len();
            (HostAnswer::File { size_bytes }, Some(file.into()))
        }
        HostRequest::OpenSuspend(guest) => {
            let file = hostd.files.open_suspend(&guest)?;
            (HostAnswer::File { size_bytes: 0 }, Some(file.into()))
        }
        HostRequest::NetworkStatus => (HostAnswer::NetworkStatus(hostd.networks.status()), None),
        HostRequest::FirmwareStatus => (HostAnswer::FirmwareStatus { uefi: host::firmware::uefi_is_there() }, None),
        HostRequest::Doctor => (HostAnswer::Findings(host::doctor::doctor(&hostd.config.state)), None),
    })
}

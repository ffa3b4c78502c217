//! The closed set of what the web role may ask for. Everything in a request is checked again here.

use std::os::fd::OwnedFd;

use super::Hostd;
use crate::{
    error::Error,
    host,
    wire::{HostAnswer, HostRefusal, HostRequest, Place},
};

/// Does what is asked. The descriptors go with the answer.
pub(super) fn answer(hostd: &mut Hostd, request: HostRequest) -> (Result<HostAnswer, HostRefusal>, Vec<OwnedFd>) {
    match carry_out(hostd, request) {
        Ok((answer, descriptors)) => (Ok(answer), descriptors),
        Err(error) => {
            tracing::info!("refused: {}", error.for_log());
            (Err(HostRefusal { kind: error.kind(), message: error.to_string() }), vec![])
        }
    }
}

fn carry_out(hostd: &mut Hostd, request: HostRequest) -> Result<(HostAnswer, Vec<OwnedFd>), Error> {
    Ok(match request {
        HostRequest::StartEngine(launch) => {
            hostd.engines.start(&launch)?;
            (HostAnswer::Done, vec![])
        }
        HostRequest::KillEngine(guest) => {
            hostd.engines.kill(&guest);
            (HostAnswer::Done, vec![])
        }
        HostRequest::ListEngines => (HostAnswer::Engines(hostd.engines.list()), vec![]),
        HostRequest::OpenFile(place) => {
            let file = hostd.files.open_to_read(&place)?;
            let size_bytes =
                file.metadata().map_err(|error| Error::internal("Cannot read the file's size.", error))?.len();
            (HostAnswer::File { size_bytes }, vec![file.into()])
        }
        HostRequest::OpenDisk { guest, disk } => {
            hostd.engines.must_live(&guest)?;
            let file = hostd.files.open_disk(&Place::Disk(disk), false)?;
            (HostAnswer::File { size_bytes: 0 }, vec![file.into()])
        }
        HostRequest::ConnectNetwork { spec, attachment } => {
            (HostAnswer::Done, hostd.engines.connect_more(&spec, &attachment)?)
        }
        HostRequest::OpenSuspend(guest) => {
            let file = hostd.files.open_suspend(&guest)?;
            (HostAnswer::File { size_bytes: 0 }, vec![file.into()])
        }
        HostRequest::NetworkStatus => (HostAnswer::NetworkStatus(hostd.networks.status()), vec![]),
        HostRequest::FirmwareStatus => (HostAnswer::FirmwareStatus { uefi: host::firmware::uefi_is_there() }, vec![]),
        HostRequest::Doctor => (HostAnswer::Findings(host::doctor::doctor(&hostd.config.state)), vec![]),
    })
}

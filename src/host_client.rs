//! The web role's end of the socket to `hostd`: calls with answers in any order, and the news that engines have ended.

use std::{collections::HashMap, io, os::fd::OwnedFd, time::Duration};

use tokio::{
    io::Interest,
    net::UnixStream,
    sync::{mpsc, oneshot},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::{
    error::{Error, ErrorKind, Result},
    types::Id,
    wire::{self, EngineEnd, HostAnswer, HostCall, HostMessage, HostRefusal, HostRequest},
};

/// `hostd` is one thread; what it does takes milliseconds, except the doctor.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// Calls that wait to be sent.
const QUEUE_LEN: usize = 64;

/// An engine's process has ended.
#[derive(Debug, Clone)]
pub struct EngineGone {
    pub guest: Id,
    pub end: EngineEnd,
}

type Answer = std::result::Result<(HostAnswer, Vec<OwnedFd>), HostRefusal>;

struct Call {
    request: HostRequest,
    answer: oneshot::Sender<Answer>,
}

#[derive(Clone)]
pub struct HostClient {
    calls: mpsc::Sender<Call>,
    gone: CancellationToken,
}

impl HostClient {
    /// Takes over the socket; must be called inside a runtime, which keeps the connection. The receiver gets each `EngineGone` once.
    pub fn start(socket: OwnedFd) -> Result<(HostClient, mpsc::UnboundedReceiver<EngineGone>)> {
        let failed = |error| Error::internal("Cannot talk to the supervisor.", error);
        // The type is that of a stream; all it does here is to wait. `wire` reads and writes whole packets.
        let socket = std::os::unix::net::UnixStream::from(socket);
        socket.set_nonblocking(true).map_err(failed)?;
        let socket = UnixStream::from_std(socket).map_err(failed)?;
        let (calls, queue) = mpsc::channel(QUEUE_LEN);
        let (ends, ended) = mpsc::unbounded_channel();
        let gone = CancellationToken::new();
        let client = HostClient { calls, gone: gone.clone() };
        tokio::spawn(async move {
            if let Err(error) = converse(&socket, queue, ends).await {
                tracing::error!(%error, "the connection to the supervisor broke");
            }
            gone.cancel();
        });
        Ok((client, ended))
    }

    /// Asks `hostd` and waits for the answer with its descriptors.
    ///
    /// Errors: what `hostd` refuses with; `Unavailable` when it does not answer.
    pub async fn call(&self, request: HostRequest) -> Result<(HostAnswer, Vec<OwnedFd>)> {
        let unavailable = || Error::new(ErrorKind::Unavailable, "The supervisor does not answer; try again.");
        let (answer, answered) = oneshot::channel();
        self.calls.send(Call { request, answer }).await.map_err(|_| unavailable())?;
        match timeout(ANSWER_TIMEOUT, answered).await {
            Ok(Ok(Ok(answer))) => Ok(answer),
            Ok(Ok(Err(refusal))) => Err(Error::new(refusal.kind, refusal.message)),
            Ok(Err(_)) | Err(_) => Err(unavailable()),
        }
    }

    /// Returns when `hostd` has ended.
    pub async fn gone(&self) {
        self.gone.cancelled().await;
    }
}

/// Sends calls and hands out answers until either end closes.
async fn converse(
    socket: &UnixStream,
    mut queue: mpsc::Receiver<Call>,
    ends: mpsc::UnboundedSender<EngineGone>,
) -> io::Result<()> {
    let mut waiting: HashMap<u64, oneshot::Sender<Answer>> = HashMap::new();
    let mut seq = 0;
    loop {
        tokio::select! {
            call = queue.recv() => {
                let Some(Call { request, answer }) = call else { return Ok(()) };
                seq += 1;
                // A caller that stopped waiting leaves its entry behind; it goes here.
                waiting.retain(|_, answer| !answer.is_closed());
                waiting.insert(seq, answer);
                let call = HostCall { seq, request };
                match socket.async_io(Interest::WRITABLE, || wire::send(socket, &call, &[])).await {
                    // Too long: nothing was sent, and who asked is told that nobody answers.
                    Err(error) if error.kind() == io::ErrorKind::InvalidInput => drop(waiting.remove(&seq)),
                    sent => sent?,
                }
            }
            message = socket.async_io(Interest::READABLE, || wire::receive::<HostMessage>(socket)) => {
                match message? {
                    None => return Ok(()),
                    Some((HostMessage::Answer { seq, result }, fds)) => {
                        if let Some(answer) = waiting.remove(&seq) {
                            let _ = answer.send(result.map(|answer| (answer, fds)));
                        }
                    }
                    Some((HostMessage::EngineGone { guest, end }, _)) => {
                        let _ = ends.send(EngineGone { guest, end });
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;
    use crate::wire::EndKind;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    #[actix_rt::test]
    async fn answers_find_their_callers_in_any_order() {
        let (near, far) = pair();
        let (client, mut ends) = HostClient::start(near).unwrap();
        let host = std::thread::spawn(move || {
            let calls: Vec<HostCall> = (0..2).map(|_| wire::receive(&far).unwrap().unwrap().0).collect();
            let guest = Id::random();
            let end = EngineEnd { how: EndKind::Killed, reason: "ended without a word".into() };
            wire::send(&far, &HostMessage::EngineGone { guest, end }, &[]).unwrap();
            for call in calls.iter().rev() {
                let result = match call.request {
                    HostRequest::ListEngines => Ok(HostAnswer::Engines(vec![])),
                    _ => Err(HostRefusal { kind: ErrorKind::Conflict, message: "It still runs.".into() }),
                };
                wire::send(&far, &HostMessage::Answer { seq: call.seq, result }, &[]).unwrap();
            }
        });
        let (list, kill) =
            tokio::join!(client.call(HostRequest::ListEngines), client.call(HostRequest::KillEngine(Id::random())));
        assert!(matches!(list.unwrap().0, HostAnswer::Engines(_)));
        assert_eq!(kill.unwrap_err().to_string(), "It still runs.");
        assert_eq!(ends.recv().await.unwrap().end.how, EndKind::Killed);
        host.join().unwrap();
        client.gone().await;
        let after = client.call(HostRequest::ListEngines).await.unwrap_err();
        assert_eq!(after.kind(), ErrorKind::Unavailable);
    }
}

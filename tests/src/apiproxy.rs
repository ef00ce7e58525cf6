//! A door in front of the API server, which a test opens and shuts: how a watch breaks, stalls and comes back.
//!
//! It passes bytes of TCP connections and knows nothing of TLS, so a client sees the real server behind it. It may listen in
//! a lab's namespace, where a daemon reaches it on loopback as it would an API server on its node.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};
use socket2::SockRef;

use crate::netns::Netns;

/// What the door does with connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Door {
    /// Passes everything.
    #[default]
    Open,
    /// Resets new connections at once; established ones go on ([`ApiProxy::cut`] ends them).
    Shut,
    /// Takes connections and bytes and passes nothing on, in either direction, until it is opened: a network that has
    /// gone silent.
    Silent,
}

/// The door; shut for good when dropped.
#[derive(Debug)]
pub struct ApiProxy {
    address: SocketAddr,
    listener: TcpListener,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    door: Door,
    stopped: bool,
    accepted: usize,
    /// The connections that are open, by a number of their own.
    open: HashMap<usize, Connection>,
}

#[derive(Debug)]
struct Connection {
    ends: [TcpStream; 2],
    /// How many directions still pass bytes.
    directions: usize,
}

impl Connection {
    fn shut(&self) {
        for end in &self.ends {
            // No TIME_WAIT, and a reset for whoever still sends.
            let _ = SockRef::from(end).set_linger(Some(Duration::ZERO));
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}

impl ApiProxy {
    /// Listens on a free port of loopback, in `netns` or in this process's namespace, and connects to `upstream` from this
    /// process's.
    ///
    /// # Errors
    /// Where it cannot listen.
    pub fn start(netns: Option<&Netns>, upstream: SocketAddr) -> Result<Self> {
        let listen = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listening on loopback");
        let listener = match netns {
            Some(netns) => netns.enter(listen)?,
            None => listen()?,
        };
        let shared = Arc::new(Shared::default());
        let thread = thread::Builder::new().name("api proxy".to_owned()).spawn({
            let (listener, shared) = (listener.try_clone()?, Arc::clone(&shared));
            move || accept(&listener, upstream, &shared)
        })?;
        Ok(Self { address: listener.local_addr()?, listener, shared, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Opens or shuts it.
    pub fn set(&self, door: Door) {
        self.shared.lock().door = door;
        self.shared.changed.notify_all();
    }

    /// Breaks every connection, as when the machine in between restarts; returns how many. New ones are taken as the door
    /// is.
    pub fn cut(&self) -> usize {
        let open = std::mem::take(&mut self.shared.lock().open);
        self.shared.changed.notify_all();
        open.values().for_each(Connection::shut);
        open.len()
    }

    /// How many connections are open.
    pub fn connections(&self) -> usize {
        self.shared.lock().open.len()
    }

    /// How many connections were ever let in.
    pub fn accepted(&self) -> usize {
        self.shared.lock().accepted
    }
}

impl Drop for ApiProxy {
    fn drop(&mut self) {
        self.shared.lock().stopped = true;
        let _ = SockRef::from(&self.listener).shutdown(Shutdown::Both);
        self.cut();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while the door is silent. False where connection `number` has been cut meanwhile.
    fn may_pass(&self, number: usize) -> bool {
        let mut state = self.lock();
        while state.door == Door::Silent && !state.stopped && state.open.contains_key(&number) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        !state.stopped && state.open.contains_key(&number)
    }
}

fn accept(listener: &TcpListener, upstream: SocketAddr, shared: &Arc<Shared>) {
    loop {
        let accepted = listener.accept();
        if shared.lock().stopped {
            return;
        }
        match accepted {
            Ok((client, _)) => {
                // What cannot be passed on is reset, as by a machine on which nothing listens.
                let _ = SockRef::from(&client).set_linger(Some(Duration::ZERO));
                let _ = take(&client, upstream, shared);
            }
            Err(_) => thread::sleep(Duration::from_millis(10)),
        }
    }
}

fn take(client: &TcpStream, upstream: SocketAddr, shared: &Arc<Shared>) -> Result<()> {
    if shared.lock().door == Door::Shut {
        return Ok(());
    }
    let server = TcpStream::connect_timeout(&upstream, Duration::from_secs(1))?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    SockRef::from(client).set_linger(None)?;
    let number = {
        let mut state = shared.lock();
        state.accepted += 1;
        let number = state.accepted;
        let ends = [client.try_clone()?, server.try_clone()?];
        state.open.insert(number, Connection { ends, directions: 2 });
        number
    };
    for (from, to) in [(client, &server), (&server, client)] {
        let (from, to, shared) = (from.try_clone()?, to.try_clone()?, Arc::clone(shared));
        thread::Builder::new().name("api proxy".to_owned()).spawn(move || pass(number, from, to, &shared))?;
    }
    Ok(())
}

/// One direction of a connection, until it ends.
fn pass(number: usize, mut from: TcpStream, mut to: TcpStream, shared: &Shared) {
    let mut buffer = vec![0; 64 << 10];
    let ended_well = loop {
        match from.read(&mut buffer) {
            Ok(0) => break shared.may_pass(number) && to.shutdown(Shutdown::Write).is_ok(),
            Ok(length) if shared.may_pass(number) && to.write_all(&buffer[..length]).is_ok() => {}
            _ => break false,
        }
    };
    let mut state = shared.lock();
    let Some(connection) = state.open.get_mut(&number) else {
        return;
    };
    connection.directions -= 1;
    if !ended_well {
        connection.shut();
    }
    if connection.directions == 0 {
        state.open.remove(&number);
    }
}

//! The load: connect, one byte there, one byte back, close, again and again.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use affinity_tests::cgroup::ThreadCgroup;
use affinity_tests::topology::Host;
use anyhow::{Context as _, Result, ensure};
use socket2::{Domain, Socket, Type};

/// How many connections of a backend are served at the same time: as many as any client has threads.
const SERVERS: usize = 16;
/// How long a step of an exchange may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// Serves on every address of the backend until the process ends: answers each byte by one, and closes after the client.
pub fn serve(backend: &Host, port: u16) -> Result<()> {
    // Of the lab's one family.
    let address = SocketAddr::new(backend.ip(), port);
    let socket = backend.netns.enter(|| {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.bind(&address.into())?;
        socket.listen(4096)?;
        Ok(socket)
    })?;
    for _ in 0..SERVERS {
        let socket = socket.try_clone()?;
        thread::Builder::new().name("backend".to_owned()).spawn(move || {
            while let Ok((mut peer, _)) = socket.accept() {
                let _ = peer.set_tcp_nodelay(true);
                let _ = peer.set_read_timeout(Some(PATIENCE));
                let mut byte = [0];
                while matches!(peer.read(&mut byte), Ok(1)) && peer.write_all(b"y").is_ok() {}
            }
        })?;
    }
    Ok(())
}

/// What a load came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Done {
    /// Exchanges.
    pub exchanges: u64,
    /// Those that failed.
    pub failed: u64,
    /// Exchanges a second.
    pub rate: f64,
}

/// Runs the load from a host, by so many threads, each with one connection at a time.
pub fn run(
    from: &Host,
    cgroup: Option<&ThreadCgroup>,
    to: SocketAddr,
    threads: usize,
    duration: Duration,
) -> Result<Done> {
    from.netns.enter(|| {
        // Threads that are started here are in the same namespace and cgroup.
        cgroup.map_or(Ok(()), ThreadCgroup::join)?;
        let start = Instant::now();
        let end = start + duration;
        let done = thread::scope(|scope| {
            let clients: Vec<_> = (0..threads).map(|_| scope.spawn(|| client(to, end))).collect();
            clients.into_iter().try_fold(Done::default(), |sum, client| {
                let done = client.join().map_err(|_| anyhow::anyhow!("a client panicked"))?;
                anyhow::Ok(Done {
                    exchanges: sum.exchanges + done.exchanges,
                    failed: sum.failed + done.failed,
                    rate: 0.0,
                })
            })
        })?;
        ensure!(done.exchanges > 0, "no exchange of {} with {to} came through", from.name);
        ensure!(
            done.failed * 1_000 <= done.exchanges,
            "{} exchanges with {to}, {} failed",
            done.exchanges,
            done.failed
        );
        let exchanges = f64::from(u32::try_from(done.exchanges).context("more exchanges than can be")?);
        Ok(Done { rate: exchanges / start.elapsed().as_secs_f64(), ..done })
    })
}

fn client(to: SocketAddr, end: Instant) -> Done {
    let mut done = Done::default();
    // Once at least: on a busy machine a thread may come to run late.
    loop {
        if exchange(to).is_ok() {
            done.exchanges += 1;
        } else {
            done.failed += 1;
        }
        if Instant::now() >= end {
            return done;
        }
    }
}

fn exchange(to: SocketAddr) -> std::io::Result<()> {
    let mut socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.set_tcp_nodelay(true)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    socket.connect(&to.into())?;
    socket.write_all(b"x")?;
    let mut byte = [0];
    if socket.read(&mut byte)? == 1 { Ok(()) } else { Err(ErrorKind::UnexpectedEof.into()) }
}

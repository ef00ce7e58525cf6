//! The programs of sockets: a call of a socket's, by its context, to what `affinity_common::dp::sock` makes of it.
//!
//! An IPv4 address in an IPv6 socket (`::ffff:a.b.c.d`) is unwrapped here, and served by the code of IPv4.

use core::marker::PhantomData;

use affinity_common::{
    abi::{netns::NetnsKey, sockets::SocketCookie},
    dp::sock::{self, Call, Named, Opening},
    family::{Family, V4, V6},
    reason::{Program, Reason, Verdict},
    types::{Port, Proto},
};
use aya_ebpf::{
    EbpfContext,
    bindings::{bpf_sock, bpf_sock_addr},
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval},
    macros::{cgroup_sock, cgroup_sock_addr},
    programs::{SockAddrContext, SockContext},
};

use crate::env::{self, Kernel};

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
const ECONNREFUSED: i32 = 111;
/// The third word of an IPv4 address in an IPv6 one (RFC 4291, 2.5.5.2); the two before it are 0.
const MAPPED: u32 = 0xffff_u32.to_be();

/// Where a context of a family's hook has its address, and in which family that is.
trait Place {
    type Family: Family;

    /// The address that is named.
    fn name(ctx: *const bpf_sock_addr) -> <Self::Family as Family>::Addr;
    /// Names another one.
    fn rename(ctx: *mut bpf_sock_addr, addr: &<Self::Family as Family>::Addr);
    /// What the message is sent from; of `sendmsg` only.
    fn sent_from(ctx: *const bpf_sock_addr) -> <Self::Family as Family>::Addr;
    /// What the socket is bound to.
    fn bound_to(sk: *const bpf_sock) -> <Self::Family as Family>::Addr;
    /// What the socket is connected to.
    fn connected_to(sk: *const bpf_sock) -> <Self::Family as Family>::Addr;
}

/// Reads a field of a context. Volatile: the verifier knows fields, and none that the compiler has joined.
macro_rules! field {
    ($ctx:expr, $($field:tt)+) => {
        // SAFETY: a field of the context or of the socket that the kernel has given us, which the verifier has checked.
        unsafe { (&raw const (*$ctx).$($field)+).read_volatile() }
    };
}

/// Writes a field of a context.
macro_rules! set_field {
    ($ctx:expr, $value:expr, $($field:tt)+) => {
        // SAFETY: a field of the context that the kernel has given us, which the verifier has checked.
        unsafe { (&raw mut (*$ctx).$($field)+).write_volatile($value) }
    };
}

/// Reads four words.
macro_rules! words {
    ($ctx:expr, $field:ident) => {
        [field!($ctx, $field[0]), field!($ctx, $field[1]), field!($ctx, $field[2]), field!($ctx, $field[3])]
    };
}

/// The octets of four words that are in network byte order.
#[inline(always)]
fn octets(words: [u32; 4]) -> [u8; 16] {
    bytemuck::cast(words)
}

/// IPv4 of an IPv4 hook.
struct Ip4;

impl Place for Ip4 {
    type Family = V4;

    #[inline(always)]
    fn name(ctx: *const bpf_sock_addr) -> [u8; 4] {
        field!(ctx, user_ip4).to_ne_bytes()
    }

    #[inline(always)]
    fn rename(ctx: *mut bpf_sock_addr, addr: &[u8; 4]) {
        set_field!(ctx, u32::from_ne_bytes(*addr), user_ip4);
    }

    #[inline(always)]
    fn sent_from(ctx: *const bpf_sock_addr) -> [u8; 4] {
        field!(ctx, msg_src_ip4).to_ne_bytes()
    }

    #[inline(always)]
    fn bound_to(sk: *const bpf_sock) -> [u8; 4] {
        field!(sk, src_ip4).to_ne_bytes()
    }

    #[inline(always)]
    fn connected_to(sk: *const bpf_sock) -> [u8; 4] {
        field!(sk, dst_ip4).to_ne_bytes()
    }
}

/// IPv6.
struct Ip6;

impl Place for Ip6 {
    type Family = V6;

    #[inline(always)]
    fn name(ctx: *const bpf_sock_addr) -> [u8; 16] {
        octets(words!(ctx, user_ip6))
    }

    #[inline(always)]
    fn rename(ctx: *mut bpf_sock_addr, addr: &[u8; 16]) {
        let words: [u32; 4] = bytemuck::cast(*addr);
        set_field!(ctx, words[0], user_ip6[0]);
        set_field!(ctx, words[1], user_ip6[1]);
        set_field!(ctx, words[2], user_ip6[2]);
        set_field!(ctx, words[3], user_ip6[3]);
    }

    #[inline(always)]
    fn sent_from(ctx: *const bpf_sock_addr) -> [u8; 16] {
        octets(words!(ctx, msg_src_ip6))
    }

    #[inline(always)]
    fn bound_to(sk: *const bpf_sock) -> [u8; 16] {
        octets(words!(sk, src_ip6))
    }

    #[inline(always)]
    fn connected_to(sk: *const bpf_sock) -> [u8; 16] {
        octets(words!(sk, dst_ip6))
    }
}

/// IPv4 of an IPv6 hook.
struct Mapped;

impl Mapped {
    #[inline(always)]
    fn is_in(words: [u32; 4]) -> bool {
        words[0] == 0 && words[1] == 0 && words[2] == MAPPED
    }
}

impl Place for Mapped {
    type Family = V4;

    #[inline(always)]
    fn name(ctx: *const bpf_sock_addr) -> [u8; 4] {
        field!(ctx, user_ip6[3]).to_ne_bytes()
    }

    #[inline(always)]
    fn rename(ctx: *mut bpf_sock_addr, addr: &[u8; 4]) {
        set_field!(ctx, u32::from_ne_bytes(*addr), user_ip6[3]);
    }

    /// The kernel sends such a message by IPv4's hook.
    #[inline(always)]
    fn sent_from(_: *const bpf_sock_addr) -> [u8; 4] {
        [0; 4]
    }

    #[inline(always)]
    fn bound_to(sk: *const bpf_sock) -> [u8; 4] {
        Ip4::bound_to(sk)
    }

    #[inline(always)]
    fn connected_to(sk: *const bpf_sock) -> [u8; 4] {
        Ip4::connected_to(sk)
    }
}

/// A call, with its address as the place has it. `SENDS`: it is `sendmsg`, whose context knows the source.
struct Address<'a, P, const SENDS: bool> {
    ctx: &'a SockAddrContext,
    place: PhantomData<P>,
}

impl<'a, P, const SENDS: bool> Address<'a, P, SENDS> {
    #[inline(always)]
    fn of(ctx: &'a SockAddrContext) -> Self {
        Self { ctx, place: PhantomData }
    }

    #[inline(always)]
    fn sk(&self) -> *const bpf_sock {
        field!(self.ctx.sock_addr, __bindgen_anon_1.sk)
    }
}

impl<P: Place, const SENDS: bool> Named<P::Family> for Address<'_, P, SENDS> {
    #[inline(always)]
    fn cookie(&self) -> SocketCookie {
        // SAFETY: takes the context, returns a number.
        SocketCookie::new(unsafe { bpf_get_socket_cookie(self.ctx.as_ptr()) })
    }

    #[inline(always)]
    fn addr(&self) -> <P::Family as Family>::Addr {
        P::name(self.ctx.sock_addr)
    }

    #[inline(always)]
    fn port(&self) -> Port {
        let [high, low, ..] = field!(self.ctx.sock_addr, user_port).to_ne_bytes();
        Port { be: [high, low] }
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "IANA's numbers are of 8 bits; MPTCP's 262 is none of them")]
    fn proto(&self) -> Proto {
        let number = field!(self.ctx.sock_addr, protocol);
        Proto { number: if number <= 0xff { number as u8 } else { 0 } }
    }
}

impl<P: Place, const SENDS: bool> Call<P::Family> for Address<'_, P, SENDS> {
    #[inline(always)]
    fn rename(&mut self, addr: &<P::Family as Family>::Addr, port: Port) {
        P::rename(self.ctx.sock_addr, addr);
        set_field!(self.ctx.sock_addr, u32::from_ne_bytes([port.be[0], port.be[1], 0, 0]), user_port);
    }
}

impl<P: Place, const SENDS: bool> Opening<P::Family> for Address<'_, P, SENDS> {
    #[inline(always)]
    fn netns(&self) -> NetnsKey {
        // SAFETY: takes the context, returns a number.
        NetnsKey { cookie: unsafe { bpf_get_netns_cookie(self.ctx.as_ptr()) } }
    }

    #[inline(always)]
    fn source(&self) -> <P::Family as Family>::Addr {
        if SENDS { P::sent_from(self.ctx.sock_addr) } else { P::bound_to(self.sk()) }
    }

    #[inline(always)]
    fn peer_addr(&self) -> <P::Family as Family>::Addr {
        P::connected_to(self.sk())
    }

    #[inline(always)]
    fn peer_port(&self) -> Port {
        Port { be: field!(self.sk(), dst_port).to_ne_bytes() }
    }
}

/// A socket that is closed, with its peer in IPv4 or in IPv6.
struct Closed<'a, F: Family> {
    ctx: &'a SockContext,
    addr: F::Addr,
}

impl<F: Family> Named<F> for Closed<'_, F> {
    #[inline(always)]
    fn cookie(&self) -> SocketCookie {
        // SAFETY: takes the context, returns a number.
        SocketCookie::new(unsafe { bpf_get_socket_cookie(self.ctx.as_ptr()) })
    }

    #[inline(always)]
    fn addr(&self) -> F::Addr {
        self.addr
    }

    #[inline(always)]
    fn port(&self) -> Port {
        Port { be: field!(self.ctx.sock, dst_port).to_ne_bytes() }
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "IANA's numbers are of 8 bits; MPTCP's 262 is none of them")]
    fn proto(&self) -> Proto {
        let number = field!(self.ctx.sock, protocol);
        Proto { number: if number <= 0xff { number as u8 } else { 0 } }
    }
}

/// Counts; returns what the kernel is to do: 1 goes on.
#[inline(always)]
fn end(program: Program, reason: Reason) -> i32 {
    env::count(program, reason, 0);
    1
}

/// Counts; a call that is refused fails as one that the other side has refused.
#[inline(always)]
fn end_or_refuse(program: Program, reason: Reason) -> i32 {
    env::count(program, reason, 0);
    if reason.verdict() == Verdict::Pass {
        return 1;
    }
    // SAFETY: takes a number, of the range of errors.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    0
}

/// The two programs of a call, of IPv4's and of IPv6's sockets. A macro, for attributes take no generic functions.
macro_rules! programs {
    ($($(#[doc = $doc:literal])+ $v4:ident($hook4:ident), $v6:ident($hook6:ident): $program:ident, $function:path, $end:ident, $sends:literal;)+) => {$(
        $(#[doc = $doc])+ ///
        /// By an IPv4 address.
        #[cgroup_sock_addr($hook4)]
        pub fn $v4(ctx: SockAddrContext) -> i32 {
            use $function as function;
            $end(Program::$program, function(&Kernel, &mut Address::<Ip4, $sends>::of(&ctx)))
        }

        $(#[doc = $doc])+ ///
        /// By an IPv6 address.
        #[cgroup_sock_addr($hook6)]
        pub fn $v6(ctx: SockAddrContext) -> i32 {
            use $function as function;
            $end(Program::$program, if Mapped::is_in(words!(ctx.sock_addr, user_ip6)) {
                function(&Kernel, &mut Address::<Mapped, $sends>::of(&ctx))
            } else {
                function(&Kernel, &mut Address::<Ip6, $sends>::of(&ctx))
            })
        }
    )+};
}

programs! {
    /// A socket connects.
    affinity_connect4(connect4), affinity_connect6(connect6): Connect, sock::connect, end_or_refuse, false;
    /// A UDP socket sends to an address.
    affinity_sendmsg4(sendmsg4), affinity_sendmsg6(sendmsg6): Sendmsg, sock::sendmsg, end_or_refuse, true;
    /// A UDP socket hears who has sent to it.
    affinity_recvmsg4(recvmsg4), affinity_recvmsg6(recvmsg6): Recvmsg, sock::recvmsg, end, false;
    /// A socket hears whom it is connected to.
    affinity_getpeername4(getpeername4), affinity_getpeername6(getpeername6): Getpeername, sock::getpeername, end, false;
}

/// A socket is closed.
#[cgroup_sock(sock_release)]
pub fn affinity_release(ctx: SockContext) -> i32 {
    if field!(ctx.sock, dst_port) == 0 {
        return 1;
    }
    let reason = match field!(ctx.sock, family) {
        AF_INET => sock::release(&Kernel, &Closed::<V4> { ctx: &ctx, addr: Ip4::connected_to(ctx.sock) }),
        AF_INET6 if Mapped::is_in(words!(ctx.sock, dst_ip6)) => {
            sock::release(&Kernel, &Closed::<V4> { ctx: &ctx, addr: Ip4::connected_to(ctx.sock) })
        }
        AF_INET6 => sock::release(&Kernel, &Closed::<V6> { ctx: &ctx, addr: Ip6::connected_to(ctx.sock) }),
        _ => return 1,
    };
    end(Program::Release, reason)
}

//! Whether an address is a service's, at the price of a load for most that are not.

use super::Env;
use crate::{
    abi::{addresses::AddressKey, filter::Place},
    family::Family,
};

/// How an address looks, without a look-up.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Looks {
    /// A service may have it.
    pub like_service: bool,
    /// A client may talk to it directly, beside a translated connection on the same ports.
    pub like_direct: bool,
}

/// Whether a service may have the address.
#[inline(always)]
pub fn is_like_service<F: Family, E: Env<F>>(env: &E, addr: &F::Addr) -> bool {
    let place = Place::of::<F>(addr);
    place.is_in(env.service_filter(place.word))
}

/// How an address looks.
#[inline(always)]
pub fn looks<F: Family, E: Env<F>>(env: &E, addr: &F::Addr) -> Looks {
    let place = Place::of::<F>(addr);
    Looks {
        like_service: place.is_in(env.service_filter(place.word)),
        like_direct: place.is_in(env.direct_filter(place.word)),
    }
}

/// Whether clients from outside may have been led to the address.
#[inline(always)]
pub fn is_like_snat<F: Family, E: Env<F>>(env: &E, addr: &F::Addr) -> bool {
    let place = Place::of::<F>(addr);
    place.is_in(env.snat_filter(place.word))
}

/// Whether a service has the address.
#[inline(always)]
pub fn is_service<F: Family, E: Env<F>>(env: &E, addr: &F::Addr) -> bool {
    env.is_service_address(&AddressKey { addr: *addr })
}

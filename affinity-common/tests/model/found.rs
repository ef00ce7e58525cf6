//! Walks on which the datapath or the model was wrong once, as short as they were found.

use affinity_common::dp::parse::{ACK, SYN};
use affinity_common::testing::Wire;
use affinity_common::types::{Nanos, Proto};

use crate::step::{Shape, Step};
use crate::world::{End, State};
use crate::{ROOM, walk};

const CLIENT: End = ([10, 244, 0, 11], 40_000);
const POD: End = ([10, 244, 0, 101], 40_000);

fn send(service: usize, client: End, flags: u8) -> Step {
    Step::Send { service, client, flags, shape: Shape::Whole }
}

fn becomes(service: usize, place: usize, state: State) -> Step {
    Step::Backend { service, place, state }
}

fn sleep(millis: u64) -> Step {
    Step::Sleep(Nanos(millis * 1_000_000))
}

fn the_last_backend_drains_while_another_service_has_the_ports<F: Wire>() {
    let drains = |place| becomes(0, place, State::Draining);
    walk::<F>(ROOM, &[drains(3), drains(2), send(1, CLIENT, SYN), drains(0), drains(1), send(0, CLIENT, SYN)]);
}

fn a_pod_is_a_client_of_a_service_that_it_is_a_backend_of<F: Wire>() {
    walk::<F>(ROOM, &[send(1, POD, SYN)]);
}

fn a_pods_own_connection_past_services_goes_on<F: Wire>() {
    let direct = |flags| Step::Direct { client: POD, place: 2, proto: Proto::TCP, flags };
    walk::<F>(ROOM, &[send(0, POD, SYN), direct(SYN), direct(ACK)]);
}

fn a_pods_datagrams_to_itself_end_with_their_time<F: Wire>() {
    let affinity = |seconds| Step::Timeout { service: 2, seconds };
    walk::<F>(ROOM, &[affinity(0), send(2, POD, SYN), affinity(1), sleep(29_990), send(2, POD, SYN)]);
}

crate::in_both_families! {
    the_last_backend_drains_while_another_service_has_the_ports,
    a_pod_is_a_client_of_a_service_that_it_is_a_backend_of,
    a_pods_own_connection_past_services_goes_on,
    a_pods_datagrams_to_itself_end_with_their_time,
}

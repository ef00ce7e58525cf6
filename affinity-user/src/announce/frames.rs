//! What is said unasked when an address comes to a node: gratuitous ARP (RFC 5227), and neighbour advertisements (RFC 4861).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::{ArpEthIpv4Packet, ArpOperation, Icmpv6Type, PacketBuilder, icmpv6::NeighborAdvertisementHeader};

/// Everybody on a link.
const BROADCAST: [u8; 6] = [0xff; 6];
/// All IPv6 nodes of a link, `ff02::1`.
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// Neighbour discovery is believed only from the link itself.
const HOP_LIMIT: u8 = 255;
/// The option that carries the link-layer address of an advertisement's target, and its length in units of eight bytes.
const TARGET_LINK_LAYER_ADDRESS: [u8; 2] = [2, 1];

/// The frames that tell a link that an address is at a link-layer address from now on.
pub fn unasked(address: IpAddr, mac: [u8; 6]) -> Vec<Vec<u8>> {
    match address {
        // Some listen to requests alone, some to replies.
        IpAddr::V4(address) => {
            [ArpOperation::REQUEST, ArpOperation::REPLY].map(|operation| arp(address, mac, operation)).into()
        }
        IpAddr::V6(address) => vec![advertisement(address, mac)],
    }
}

/// The link-layer group of those who are asked for an address: `33:33` and the last four bytes of [`solicited_node_address`]
/// (RFC 2464, section 7).
pub fn solicited_node_group(address: Ipv6Addr) -> [u8; 6] {
    let [.., a, b, c, d] = solicited_node_address(address).octets();
    [0x33, 0x33, a, b, c, d]
}

/// The multicast group of those who are asked for an address: `ff02::1:ff00:0` and its last three bytes.
pub fn solicited_node_address(address: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = address.octets();
    Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c])
}

fn arp(address: Ipv4Addr, mac: [u8; 6], operation: ArpOperation) -> Vec<u8> {
    let packet = ArpEthIpv4Packet {
        operation,
        sender_mac: mac,
        sender_ipv4: address.octets(),
        target_mac: if operation == ArpOperation::REQUEST { [0; 6] } else { mac },
        target_ipv4: address.octets(),
    };
    let builder = PacketBuilder::ethernet2(mac, BROADCAST).arp(packet.into());
    let mut frame = Vec::with_capacity(builder.size());
    builder.write(&mut frame).expect("a vector takes everything");
    frame
}

fn advertisement(address: Ipv6Addr, mac: [u8; 6]) -> Vec<u8> {
    let header = NeighborAdvertisementHeader { router: false, solicited: false, r#override: true };
    let group = [0x33, 0x33, 0, 0, 0, 1];
    let builder = PacketBuilder::ethernet2(mac, group)
        .ipv6(address.octets(), ALL_NODES.octets(), HOP_LIMIT)
        .icmpv6(Icmpv6Type::NeighborAdvertisement(header));
    let mut payload = address.octets().to_vec();
    payload.extend(TARGET_LINK_LAYER_ADDRESS);
    payload.extend(mac);
    let mut frame = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut frame, &payload).expect("a vector takes everything");
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

    #[test]
    fn arp_tells_of_itself_in_both_forms() {
        let frames = unasked([192, 0, 2, 9].into(), MAC);
        let ethernet = [&[0xff; 6][..], &MAC, &[8, 6]].concat();
        let request = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &MAC, &[192, 0, 2, 9], &[0; 6], &[192, 0, 2, 9]].concat();
        let reply = [&[0, 1, 8, 0, 6, 4, 0, 2][..], &MAC, &[192, 0, 2, 9], &MAC, &[192, 0, 2, 9]].concat();
        assert_eq!(frames, [[ethernet.clone(), request].concat(), [ethernet, reply].concat()]);
    }

    #[test]
    fn an_advertisement_overrides_what_neighbours_know() {
        let address: Ipv6Addr = "2001:db8::c0:ffee".parse().expect("an address");
        let frames = unasked(address.into(), MAC);
        let frame = &frames[0];
        assert_eq!(frame[..14], [&[0x33, 0x33, 0, 0, 0, 1][..], &MAC, &[0x86, 0xdd]].concat());
        // Payload length, next header ICMPv6, hop limit, source and destination.
        assert_eq!(frame[18..22], [0, 32, 58, 255]);
        assert_eq!(frame[22..38], address.octets());
        assert_eq!(frame[38..54], ALL_NODES.octets());
        // Type, code; override alone; target; option.
        assert_eq!(frame[54..56], [136, 0]);
        assert_eq!(frame[58..62], [0x20, 0, 0, 0]);
        assert_eq!(frame[62..78], address.octets());
        assert_eq!(frame[78..], [&[2, 1][..], &MAC].concat());
        // The checksum over the pseudo header and the message is zero's complement.
        let pseudo = [&frame[22..54], &[0, 0, 0, 32, 0, 0, 0, 58], &frame[54..]].concat();
        let sum: u32 = pseudo.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }

    #[test]
    fn groups_have_the_last_three_bytes() {
        let address = "2001:db8::c0:ffee".parse().expect("an address");
        assert_eq!(solicited_node_group(address), [0x33, 0x33, 0xff, 0xc0, 0xff, 0xee]);
        assert_eq!(solicited_node_address(address), "ff02::1:ffc0:ffee".parse::<Ipv6Addr>().expect("an address"));
    }
}
